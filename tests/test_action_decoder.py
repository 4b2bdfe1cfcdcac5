"Decoders against stored values, their precision under autocast, and saved ones that do not fit"
import json
import pytest, torch
from safetensors.torch import load_file, save_file
from vadnb.core import CheckpointError, ConfigError
from vadnb.models.action_decoder import CONFIG, DECODERS, WEIGHTS, ActionDecoder

@pytest.fixture(scope='module')
def stored(shared):
    path = shared/'golden'/'action_cls'
    return json.loads((path/'action_cls_loss.json').read_text())['config'],load_file(path/'action_cls_loss.safetensors')

def built(stored, kind):
    c,held = stored
    decoder = ActionDecoder(c['hidden_size'], c['num_classes'], kind, c['mlp_hidden_size'])
    decoder.load_state_dict({k.removeprefix(f'{kind}/'): v for k,v in held.items() if k.startswith(f'{kind}/head')})
    return decoder

@pytest.mark.parametrize('kind', ('linear', 'mlp'))
def test_logits_and_gradients_are_the_stored_ones(stored, kind):
    _,held = stored
    decoder,rows = built(stored, kind),held['hidden_rows'].clone().requires_grad_()
    logits = decoder(rows)
    torch.testing.assert_close(logits, held[f'{kind}/logits'], atol=2e-5, rtol=1e-5)
    torch.nn.functional.cross_entropy(logits, held['labels']).backward()
    torch.testing.assert_close(rows.grad, held[f'{kind}/ce/grad_hidden'], atol=1e-5, rtol=1e-4)
    found = {k.rsplit('grad_')[1]: v for k,v in held.items() if k.startswith(f'{kind}/ce/grad_head') or k.startswith(f'{kind}/ce/grad_') and 'head' in k}
    assert {*found}=={n for n,_ in decoder.named_parameters()}
    for n,p in decoder.named_parameters(): torch.testing.assert_close(p.grad, found[n], atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('kind', DECODERS)
def test_autocast_does_not_reach_a_decoder(kind):
    "A linear layer in float32 answers in bf16 under autocast; a decoder does not, nor do its gradients"
    torch.manual_seed(0)
    decoder,rows = ActionDecoder(32, 5, kind, heads=4).eval(),torch.randn(3, 32)
    visual = [torch.randn(n, 32) for n in (4, 2, 3)]
    def run(on):
        decoder.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=on):
            assert torch.nn.Linear(32, 5)(rows).dtype==(torch.bfloat16 if on else torch.float32)
            logits = decoder(rows, visual)
        # behind the context, as the loop does it: torch lets autocast into a backward pass that is inside of it
        logits.square().sum().backward()
        return [logits]+[p.grad.clone() for p in decoder.parameters() if p.grad is not None]
    plain,around = run(False),run(True)
    for a,b in zip(plain, around, strict=True): assert b.dtype==torch.float32 and torch.equal(a, b)
    assert decoder(rows.bfloat16(), [v.bfloat16() for v in visual]).dtype==torch.float32

def test_samples_of_a_transformer_do_not_meet():
    torch.manual_seed(0)
    decoder,rows = ActionDecoder(32, 5, 'transformer', heads=4).eval(),torch.randn(3, 32)
    visual = [torch.randn(n, 32) for n in (6, 1, 3)]
    together = decoder(rows, visual)
    for i in range(3): torch.testing.assert_close(decoder(rows[i:i+1], visual[i:i+1])[0], together[i], atol=1e-5, rtol=0)
    # not a shift of all channels, which a norm takes away
    other = [visual[0].flip(-1), *visual[1:]]
    moved = (decoder(rows, other)-together).abs().amax(1)
    assert moved[0]>1e-3 and moved[1:].max()==0

def public_transformer(hidden, classes, middle, layers):
    "A decoder as the public action_cls saves it, and what it answers (written from the description of its layers)"
    torch.manual_seed(0)
    nn = torch.nn
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1,self.norm2,self.attn = nn.LayerNorm(hidden),nn.LayerNorm(hidden),nn.MultiheadAttention(hidden, 4, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(hidden, 4*hidden), nn.GELU(), nn.Dropout(0.), nn.Linear(4*hidden, hidden), nn.Dropout(0.))
        def forward(self, x):
            y = self.norm1(x); x = x+self.attn(y, y, y, need_weights=False)[0]
            return x+self.mlp(self.norm2(x))
    net = nn.Module()
    net.projection,net.transformer_layers,net.final_norm = nn.Linear(hidden, hidden),nn.ModuleList(Layer() for _ in range(layers)),nn.LayerNorm(hidden)
    net.head = nn.Sequential(nn.Linear(hidden, middle), nn.GELU(), nn.Dropout(0.), nn.Linear(middle, classes))
    def answer(rows, visual):
        x = torch.cat([net.projection(rows)[:,None], visual], 1)
        for layer in net.transformer_layers: x = layer(x)
        return net.head(net.final_norm(x)[:,0])
    return net,answer

def test_decoders_of_others_are_read(tmp_path):
    "Weights alone, without a configuration, as the guide's program leaves them"
    net,answer = public_transformer(32, 5, 12, 3)
    save_file(net.state_dict(), tmp_path/WEIGHTS)
    rows,visual = torch.randn(2, 32),torch.randn(2, 6, 32)
    decoder = ActionDecoder.from_pretrained(tmp_path, heads=4)
    torch.testing.assert_close(decoder(rows, list(visual)), answer(rows, visual), atol=1e-5, rtol=0)
    control = ActionDecoder.from_pretrained(tmp_path, heads=4, decoder_type='transformer_no_vision')
    torch.testing.assert_close(control(rows), answer(rows, visual[:,:0]), atol=1e-5, rtol=0)
    for kind in ('linear', 'mlp'):
        own = ActionDecoder(32, 5, kind, 7)
        save_file(own.state_dict(), tmp_path/WEIGHTS)
        other = ActionDecoder.from_pretrained(tmp_path)
        assert other.decoder_type==kind and torch.equal(other(rows), own(rows))

@pytest.mark.parametrize('kind', DECODERS)
def test_a_saved_decoder_comes_back_and_another_does_not_fit(kind, tmp_path):
    torch.manual_seed(0)
    words = dict(heads=4, mlp_hidden_size=10) if kind!='linear' else {}
    decoder = ActionDecoder(32, 5, kind, **words)
    decoder.save_pretrained(tmp_path)
    again = ActionDecoder(32, 5, kind, **words)
    again.load_pretrained(tmp_path)
    for a,b in zip(again.parameters(), decoder.parameters(), strict=True): assert torch.equal(a, b)
    assert ActionDecoder.from_pretrained(tmp_path).config()==decoder.config()
    assert json.loads((tmp_path/CONFIG).read_text())['decoder_type']==kind
    others = [ActionDecoder(32, 6, kind, **words), ActionDecoder(64, 5, kind, **words), ActionDecoder(32, 5, 'mlp' if kind=='linear' else 'linear')]
    if kind!='linear': others.append(ActionDecoder(32, 5, kind, **words|dict(mlp_hidden_size=11)))
    if 'transformer' in kind: others += [ActionDecoder(32, 5, kind, **words|dict(layers=1)), ActionDecoder(32, 5, kind, **words|dict(heads=8))]
    for other in others:
        before = {k: v.clone() for k,v in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=WEIGHTS): other.load_pretrained(tmp_path)
        assert all(torch.equal(v, before[k]) for k,v in other.state_dict().items())

def test_a_missing_or_damaged_decoder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=WEIGHTS): ActionDecoder(8, 2).load_pretrained(tmp_path)
    (tmp_path/WEIGHTS).write_bytes(b'nothing')
    with pytest.raises(CheckpointError, match=WEIGHTS): ActionDecoder(8, 2).load_pretrained(tmp_path)
    save_file({'fc.weight': torch.zeros(2, 8)}, tmp_path/WEIGHTS)
    with pytest.raises(CheckpointError, match='no decoder that is known'): ActionDecoder(8, 2).load_pretrained(tmp_path)
    ActionDecoder(8, 2).save_pretrained(tmp_path)
    (tmp_path/CONFIG).write_text('{"decoder_type": "linear"}')
    with pytest.raises(CheckpointError, match=CONFIG): ActionDecoder(8, 2).load_pretrained(tmp_path)
    (tmp_path/CONFIG).write_text(json.dumps(dict(ucf=ActionDecoder(8, 2).config(), ssv2=ActionDecoder(8, 3).config())))
    with pytest.raises(CheckpointError, match='several decoders .ucf, ssv2.'): ActionDecoder(8, 2).load_pretrained(tmp_path)

def test_dropout_is_of_training_alone():
    torch.manual_seed(0)
    decoder,rows = ActionDecoder(32, 5, dropout=.5),torch.randn(3, 32)
    assert not torch.equal(decoder(rows), decoder(rows))
    decoder.eval()
    assert torch.equal(decoder(rows), decoder(rows))
    with pytest.raises(ConfigError, match='unknown'): ActionDecoder(32, 5, 'conv')
