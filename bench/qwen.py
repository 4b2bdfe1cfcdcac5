"A training step at one token against the whole causal forward pass, and a token's own row against peft's trainable tokens"
import time
import torch
from torch.nn import functional as F
from vadnb.models.action_decoder import ActionDecoder
from vadnb.models.footprint import Footprint
from vadnb.models.lora import LoraOptions, targets
from vadnb.models.qwen_batch import embed, find_places
from vadnb.models.qwen_vl import QwenVL
from vadnb.models.tiny_qwen import tiny_config, tiny_tokenizer

HIDDEN,WORDS,LENGTH,BATCH,CLASSES = 512,151_936,512,2,101

def network(layers, adapters=True):
    "A language model with the proportions of the released one, and a decoder"
    torch.manual_seed(0)
    config = tiny_config(hidden=HIDDEN, layers=layers, heads=8, vocabulary=WORDS, init_std=.02)
    config.text_config.intermediate_size = 2752
    qwen = QwenVL.from_config(config, tiny_tokenizer())
    if adapters: qwen.adapt(LoraOptions(rank=16))
    return qwen.train(),ActionDecoder(HIDDEN, CLASSES)

def texts():
    "Tokens that end at the action token"
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 264, (BATCH, LENGTH), generator=g)
    ids[:,-1] = 264
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids)),torch.randint(0, CLASSES, (BATCH,), generator=g)

def at_the_token(qwen, decoder):
    batch,labels = texts()
    return lambda: F.cross_entropy(decoder(qwen.rows(batch)), labels)

def whole_forward(qwen, decoder):
    "As a generating model is run: all hidden states kept, all words weighed"
    batch,labels = texts()
    def loss():
        found = find_places(qwen, batch)
        x = embed(qwen, batch['input_ids'], qwen.visual_tokens(batch), found)
        out = qwen.model(inputs_embeds=x, attention_mask=batch['attention_mask'], position_ids=found.positions, use_cache=False, output_hidden_states=True)
        return F.cross_entropy(decoder(out.hidden_states[-1][:,-1]), labels)
    return loss

def tokens_of_peft(qwen, decoder):
    "The same network, adapters and values, with the row as peft trains it"
    from peft import LoraConfig, get_peft_model
    other,_ = network(len(qwen.language.layers), adapters=False)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets('language'), trainable_token_indices={'embed_tokens': [264]})
    model = get_peft_model(other.model, config).train()
    own = dict(qwen.model.named_parameters())
    with torch.no_grad():
        for n,p in model.named_parameters():
            if 'trainable_tokens_delta' in n: p.copy_(qwen.action_row[None])
            elif p.requires_grad: p.copy_(own[n.removeprefix('base_model.model.')])
    batch,labels = texts()
    places = find_places(qwen, batch).positions
    def loss():
        out = model.base_model.model.model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], position_ids=places, use_cache=False)
        return F.cross_entropy(decoder(out.last_hidden_state[:,-1]), labels)
    return loss,model

def gradients(loss, module, decoder):
    "What a step gives to everything that trains, by name"
    loss().backward()
    found = {n: p.grad.flatten() for n,p in (*module.named_parameters(), *decoder.named_parameters()) if p.grad is not None}
    for m in (module, decoder): m.zero_grad()
    return found

def compare(found, others):
    "Largest difference of two steps; one that matters is no measurement"
    off = max(float((a-b).abs().max()) for a,b in zip(found, others, strict=True))
    if off>1e-5: raise RuntimeError(f'the two steps give other gradients: they differ by {off:.1e}')
    return off

def seconds(steps, rounds=5):
    "CPU seconds of each step, the least of some rounds in turns"
    taken = {k: [] for k in steps}
    for _ in range(rounds):
        for k,loss in steps.items():
            start = time.process_time()
            loss().backward()
            taken[k].append(time.process_time()-start)
    return {k: min(v) for k,v in taken.items()}

def bytes_added(loss):
    "The most that a step holds beside weights and gradients that were there"
    with Footprint() as held: loss().backward()
    return held.peak

def step_rows():
    qwen,decoder = network(8)
    steps = {'one token': at_the_token(qwen, decoder), 'everything': whole_forward(qwen, decoder)}
    off = compare(*(gradients(loss, qwen, decoder).values() for loss in steps.values()))
    # gradients are there before
    for loss in steps.values(): loss().backward()
    memory,taken = {k: bytes_added(loss) for k,loss in steps.items()},seconds(steps, 3)
    detail = dict(layers=8, hidden=HIDDEN, words=WORDS, length=LENGTH, batch=BATCH, largest_difference=off, cpu_seconds=taken, gib={k: v/2**30 for k,v in memory.items()})
    yield dict(work='training step, read at one token vs the whole causal forward pass with hidden states and logits: CPU time', ratio=taken['one token']/taken['everything'], limit=.55, detail=detail)
    yield dict(work='the same: memory added', ratio=memory['one token']/memory['everything'], limit=.6, detail=detail)

def token_rows():
    # one block, so that what a row adds is not lost in what the network takes
    qwen,decoder = network(1)
    theirs,model = tokens_of_peft(qwen, decoder)
    own = at_the_token(qwen, decoder)
    mine,other = gradients(own, qwen, decoder),gradients(theirs, model, decoder)
    kinds = lambda found, word: [v for k,v in sorted(found.items()) if word in k]
    row = [v for k,v in mine.items() if k.endswith('action_row')],[v for k,v in other.items() if 'trainable_tokens_delta' in k]
    off = max(compare(*row), compare(kinds(mine, 'lora_'), kinds(other, 'lora_')))
    frozen = at_the_token(*(still := network(1)))
    still[0].action_row.requires_grad_(False)
    steps = dict(frozen=frozen, own=own, peft=theirs)
    for loss in steps.values(): loss().backward()
    memory,taken = {k: bytes_added(loss) for k,loss in steps.items()},seconds(steps, 9)
    def added(x): return (x['own']-x['frozen'])/(x['peft']-x['frozen'])
    detail = dict(layers=1, hidden=HIDDEN, words=WORDS, length=LENGTH, batch=BATCH, largest_difference=off, cpu_seconds=taken, gib={k: v/2**30 for k,v in memory.items()})
    yield dict(work="added by a trained token row vs by peft's trainable_token_indices: CPU time", ratio=added(taken), limit=.5, detail=detail)
    yield dict(work='the same: memory', ratio=added(memory), limit=.2, detail=detail)

def rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: yield from step_rows(); yield from token_rows()
    finally: torch.set_num_threads(threads)

if __name__=='__main__':
    for row in rows(): print(row)
