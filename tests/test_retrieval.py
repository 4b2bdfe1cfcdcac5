"Recall at K against a ranking written out, for masks, keys and unequal numbers, and its memory"
import tracemalloc
import numpy as np, pytest
from vadnb.core import DataError
from vadnb.metrics.retrieval import chance_recall, retrieval_metrics
from vadnb.core import MetricWarning

def unit(x): return (x/np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

def slow(image, text, right, k):
    "Share of rows with a right candidate among the first k, wrong ones before right ones of equal similarity"
    hits = 0
    for i,a in enumerate(image):
        order = sorted(range(len(text)), key=lambda j: (-round(float(a@text[j]), 5), right[i, j]))
        hits += any(right[i, j] for j in order[:k])
    return hits/len(image)

@pytest.fixture(scope='module')
def world():
    "60 clips of 25 kinds; 90 texts, many of them equal to the letter; features on a coarse grid, so that many similarities tie"
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(25, 8))
    ki,kt = np.append(np.arange(25), rng.integers(0, 25, 35)), np.append(np.arange(25), rng.integers(0, 25, 65))
    image = unit(np.round(centre[ki]+.8*rng.normal(size=(60, 8)))+.01)
    text = unit(np.round(centre[kt])+.01)
    return image, text, ki, kt

def test_equal_to_a_ranking_written_out(world):
    image,text,ki,kt = world
    right = ki[:,None]==kt
    got = retrieval_metrics(image, text, right)
    for k in (1, 5, 10):
        assert got[f'image_to_text_r{k}']==pytest.approx(slow(image, text, right, k), abs=1e-12)
        assert got[f'text_to_image_r{k}']==pytest.approx(slow(text, image, right.T, k), abs=1e-12)
    assert 0<got['image_to_text_r1']<got['image_to_text_r10']<1
    assert retrieval_metrics(image, text, (ki, kt))==got

def test_the_order_of_the_candidates_is_nothing(world):
    image,text,ki,kt = world
    p,q = np.random.default_rng(1).permutation(60),np.random.default_rng(2).permutation(90)
    assert retrieval_metrics(image[p], text[q], (ki[p], kt[q]))==retrieval_metrics(image, text, (ki, kt))

def test_chance_is_what_blind_rankings_get():
    rng = np.random.default_rng(0)
    right = np.array([1, 3, 3, 8])
    hits = [[(rng.permutation(20)[:r]<5).any() for r in right] for _ in range(4000)]
    assert chance_recall(right, 20, 5)==pytest.approx(np.mean(hits), abs=.01)

def test_what_cannot_be_ranked(world):
    image,text,ki,kt = world
    with pytest.warns(MetricWarning, match='image_to_text_r10, text_to_image_r10 are left out'): got = retrieval_metrics(image[:10], image[:10])
    assert set(k for k in got if not k.startswith('baseline'))=={f'{a}_r{k}' for a in ('image_to_text', 'text_to_image') for k in (1, 5)}
    for call,says in ((lambda: retrieval_metrics(image, text), 'say in `same`'), (lambda: retrieval_metrics(image, text[:,:4]/np.linalg.norm(text[:,:4], axis=1, keepdims=True), (ki, kt)), '8 and 4 dimensions'),
                      (lambda: retrieval_metrics(image, text, (ki, kt[:5])), 'same: needs an integer key'), (lambda: retrieval_metrics(image, text, (ki, kt+100)), 'belongs to no text'),
                      (lambda: retrieval_metrics(image, text, (ki, kt*1.)), 'same: needs an integer key'), (lambda: retrieval_metrics(image*2, text, (ki, kt)), 'not of length 1')):
        with pytest.raises(DataError, match=says): call()

def test_memory_does_not_grow_with_the_square():
    x = unit(np.random.default_rng(0).normal(size=(12_000, 4)))
    tracemalloc.start()
    got = retrieval_metrics(x, x)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak<100e6 and got['image_to_text_r10']>.9                 # all similarities at once: 576 MB
