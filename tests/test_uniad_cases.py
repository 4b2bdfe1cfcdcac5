"The small inputs of shared/cases/uniad, and the kinds of data sets that they stand for, through commands a user gives"
import json, os, shutil
import numpy as np, pytest
from PIL import Image
from command import vadnb
from test_uniad_system import config, few_pictures, picture, train, words
from vadnb.commands.measuring import measured_split
from vadnb.core import ConfigError, DataError, read_json
from vadnb.data.image_lists import read_meta
from vadnb.data.masks import read_mask
from vadnb.data.mvtec import read_folder, read_tree, write_tree_meta
from vadnb.systems.registry import load_config, load_run
from vadnb.systems.uniad.system import read_input

@pytest.fixture
def cases(shared): return shared/'cases'/'uniad'

def mask(path, at=(8, 8), size=(64, 64), value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.zeros(size, np.uint8); a[at[0]:at[0]+12, at[1]:at[1]+12] = value
    Image.fromarray(a).save(path)

# ---------------------------------------------------------------- masks

def test_soft_masks_of_one_object_are_one_mask(cases, tmp_path):
    "Antialiased, as grey and as a palette of 240 colours: both are cut half-way, and so is every other form of it"
    grey = np.asarray(Image.open(cases/'soft_edge_mask_grey.png'))
    truth = grey>=128
    forms = dict(palette=Image.open(cases/'soft_edge_mask_palette.png'), opacity=Image.fromarray(np.dstack([np.full((*grey.shape, 3), 255, np.uint8), grey])),
                 colour=Image.fromarray(np.dstack([grey, grey*0, grey*0])), deep=Image.fromarray(grey.astype(np.uint16)*257), eight=Image.fromarray(grey))
    for name,im in forms.items():
        im.save(tmp_path/f'{name}.png')
        assert np.array_equal(read_mask(tmp_path/f'{name}.png', grey.shape, 'a.png'), truth), name
    Image.fromarray(grey).save(tmp_path/'lossy.jpg', quality=80)
    assert (read_mask(tmp_path/'lossy.jpg', grey.shape, 'a.png')==truth).mean()>.99

@pytest.mark.parametrize('levels,refused', [((85, 170, 255), True), ((85, 255), True), ((255, 250), False), ((1, 2, 3), False), ((128, 255), False)])
def test_only_a_mask_without_two_levels_is_refused(tmp_path, levels, refused):
    "Several defects of as many greys, side by side or apart; numbers and near greys lose nothing"
    for gap in (0, 4):
        a = np.zeros((64, 64), np.uint8)
        for k,v in enumerate(levels): a[8:24, 4+k*(12+gap):16+k*(12+gap)] = v
        Image.fromarray(a).save(tmp_path/'m.png')
        if not refused: assert np.array_equal(read_mask(tmp_path/'m.png', a.shape, 'a.png'), a>0)
        else:
            with pytest.raises(DataError, match='m.png: the greys 85, .* look like several defects'): read_mask(tmp_path/'m.png', a.shape, 'a.png')

# ---------------------------------------------------------------- folders

def test_mvtec_ad_2(cases, tmp_path):
    tree = read_tree(cases/'ad2_layout')
    assert {k: [r.name.split('/', 1)[1] for r in v] for k,v in tree.items()}==dict(train=[f'train/good/00{i}_regular.png' for i in range(3)],
        test=['test_public/bad/007_overexposed.png', 'test_public/good/000_regular.png', 'test_public/good/001_regular.png'], valid=[f'validation/good/00{i}_regular.png' for i in range(2)])
    bad, = (r for r in tree['test'] if r.label)
    assert bad.mask=='cable/test_public/ground_truth/bad/007_overexposed_mask.png' and {r.cls for rows in tree.values() for r in rows}=={'cable'}
    data = config(cases/'ad2_layout', tmp_path, 'run').make_data()
    # its own validation images are held back, none of the training images
    assert [len(data.split(s)) for s in ('train', 'valid', 'test')]==[3, 4, 3]
    assert [s['mask'].any().item() for s in (data.split('test')[i] for i in range(3))]==[True, False, False]
    assert all(r.name.split('/')[1]=='validation' for r in data.split('valid').data.records)
    paths = write_tree_meta(cases/'ad2_layout', tmp_path/'lists')
    assert [len(read_meta(p)) for p in paths]==[5, 3]

def test_folders_without_labels_are_said(cases, tmp_path):
    root = shutil.copytree(cases/'ad2_layout', tmp_path/'data')
    shutil.copytree(root/'cable/test_public/good', root/'cable/test_private')
    data = config(root, tmp_path, 'run').make_data()
    assert len(data.split('test'))==3
    row, = (r for r in data.rows() if r[0]=='images without labels')
    assert row[1] is None and 'test_private' in row[2]

def test_btad(tmp_path):
    for i in range(4): picture(tmp_path/'01/train/ok'/f'{i:04}.bmp', seed=i)
    for i,kind in enumerate(('ok', 'ko')): picture(tmp_path/'01/test'/kind/f'{i:04}.bmp', seed=9+i)
    mask(tmp_path/'01/ground_truth/ko/0001.png')
    data = config(tmp_path, tmp_path/'runs', 'run').make_data()
    assert [(r.name, r.label, r.mask) for r in data.split('test').records]==[('01/test/ko/0001.bmp', 1, '01/ground_truth/ko/0001.png'), ('01/test/ok/0000.bmp', 0, None)]
    assert len(data.split('train'))+len(data.split('valid'))//2==4

def test_loco(tmp_path):
    "A mask per defect, in a folder named like the image; the mask of the image is their union"
    root = tmp_path/'data'
    for i in range(3): picture(root/'box/train/good'/f'{i:03}.png', seed=i)
    picture(root/'box/validation/good/000.png', seed=5)
    for k,kind in enumerate(('good', 'logical_anomalies', 'structural_anomalies')): picture(root/'box/test'/kind/'000.png', seed=6+k)
    for i,at in enumerate(((8, 8), (40, 40))): mask(root/'box/ground_truth/logical_anomalies/000'/f'00{i}.png', at, value=253+i)
    mask(root/'box/ground_truth/structural_anomalies/000/000.png')
    test = config(root, tmp_path/'runs', 'run').make_data().split('test')
    areas = {test.records[i].name.split('/')[2]: int(test[i]['mask'].sum()) for i in range(3)}
    assert areas==dict(good=0, logical_anomalies=288, structural_anomalies=144)
    # a changed file of the folder is another sample, and an empty folder is no mask
    i = next(i for i,r in enumerate(test.records) if 'logical' in r.name)
    content = test.content(i)
    mask(root/'box/ground_truth/logical_anomalies/000/001.png', (40, 44))
    assert test.content(i)!=content
    (lists := tmp_path/'lists').mkdir()
    assert read_meta(write_tree_meta(root, lists)[1])[1].mask=='box/ground_truth/logical_anomalies/000'
    shutil.rmtree(root/'box/ground_truth/structural_anomalies/000'); (root/'box/ground_truth/structural_anomalies/000').mkdir()
    with pytest.raises(DataError, match='structural_anomalies/000: holds no mask'): read_tree(root)

def real_iad(root, classes):
    "Real-IAD's JSON files beside their images"
    (root/'lists').mkdir(parents=True)
    for cls in classes:
        def row(path, kind, drawn=None):
            picture(root/cls/path, seed=len(path))
            return dict(category=cls, anomaly_class=kind, image_path=path, mask_path=drawn)
        mask(root/cls/'NG/AK/9.png')
        held = dict(meta=dict(prefix=f'{cls}/', normal_class='OK'), train=[row(f'OK/S000{i}/{i}.png', 'OK') for i in range(4)],
                    test=[row('OK/7.png', 'OK'), row('NG/AK/9_.png', 'AK', 'NG/AK/9.png')])
        (root/'lists'/f'{cls}.json').write_text(json.dumps(held, indent=2))

def test_real_iad(tmp_path):
    "One class by its file, several by the folder of their files"
    real_iad(tmp_path/'data', ['jack', 'cap'])
    for train_,n in (('lists/jack.json', 1), ('lists', 2)):
        data = config(tmp_path/'data', tmp_path/'runs', 'run', '--data.train', train_).make_data()
        test = data.split('test')
        assert len(test)==2*n and sorted(test.classes)==sorted(['jack', 'cap'][:n]) and sum(int(test[i]['mask'].sum()) for i in range(2*n))==144*n
        assert len(data.split('train'))+len(data.split('valid'))//2==4*n

def test_a_tree_with_its_own_word_for_good(tmp_path):
    for i in range(4): picture(tmp_path/'nut/train/normal'/f'{i}.png', seed=i)
    for i,kind in enumerate(('normal', 'hole')): picture(tmp_path/'nut/test'/kind/f'{i}.png', seed=i+7)
    data = config(tmp_path, tmp_path/'runs', 'run', '--data.good', 'normal').make_data()
    assert [(r.name, r.label) for r in data.split('test').records]==[('nut/test/hole/1.png', 1), ('nut/test/normal/0.png', 0)]
    code,out,_ = vadnb('verify', '--config', 'uniad_demo', *words(tmp_path, tmp_path/'runs', 'run'))
    assert code==1 and 'normal/0.png: is no good image and lies in train' in out and 'data.good' in out

# ---------------------------------------------------------------- 16 bits

def test_ten_bits_in_sixteen(cases, tmp_path):
    "The bits of the class are found, told, kept, and used by evaluation and prediction where no training image is left"
    source = np.asarray(Image.open(cases/'ten_bits_in_sixteen.png'))
    assert source.dtype==np.uint16 and source.max()<1024
    root = tmp_path/'data'
    def shot(path, seed):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(source, seed*7, 1)).save(path)
    for i in range(5): shot(root/'wire/train/good'/f'{i}.png', i)
    shot(root/'wire/test/good/0.png', 9)
    dark = source//4
    (root/'wire/test/dent').mkdir(); Image.fromarray(dark).save(root/'wire/test/dent/1.png')
    code,out,err = vadnb('verify', '--config', 'uniad_demo', *words(root, tmp_path/'runs', 'run'))
    assert 'of 16, found in the good images: wire 10' in out+err
    learner = train(root, tmp_path/'runs', 'run')
    assert len(learner.data.split('train')[0]['image'].unique())>100 or 'feature' in learner.data.split('train')[0]
    run = tmp_path/'runs'/'run'
    assert read_json(run/'best'/'card.json')['facts']['bits']==dict(wire=10)
    shutil.rmtree(root/'wire/train')
    code,out,err = vadnb('eval', '--run', run, '--train.progress', 'false')
    assert code==0, err
    system,_ = load_run(run)
    assert system.bits==dict(wire=10)
    pixels,_ = read_input(root/'wire/test/dent/1.png', (96, 128), system.bits_of(root/'wire/test/dent/1.png'))
    assert np.array_equal(pixels[0].numpy(), dark>>2)
    # a dark image alone does not say it, and nobody guesses
    said = read_input(root/'wire/test/dent/1.png', (96, 128))
    assert isinstance(said, DataError) and 'has 16 bits, and no value needs more than 8 of them' in str(said)

# ---------------------------------------------------------------- lists and names

@pytest.mark.parametrize('line,says', [(b'\xff\xfe', 'not UTF-8'), (b'['*100_000, 'not valid JSON'), (b'{"filename": 1}', 'filename: 1 is not a name'), (b'{"label": '+b'9'*5000+b'}', 'not valid JSON'), (b'[1]', 'must be an object'),
    (b'{"filename": "a/b/c/\\ud800.png", "label": 0}', 'is not a name'), (b'{"filename": "a/b/c/d\\u0000.png", "label": 0}', 'is not a name'), (b'{"filename": "a/b/c/\\u001b[2J.png", "label": 0}', 'is not a name'),
    (b'{"filename": "a/b/c/d.png", "label": "'+b'x'*10_000+b'"}', 'is not 0'), (b'{"filename": "a/b/c/d.png", "label": 0, "clsname": {"'+b'y'*5000+b'": 1}}', 'clsname'), (b'{"'+b'k'*5000+b'": 1}', 'is not a field')])
def test_malformed_lists_are_one_short_line(tmp_path, line, says):
    (tmp_path/'train.json').write_bytes(line)
    with pytest.raises(DataError) as told: read_meta(tmp_path/'train.json')
    assert says in str(told.value) and '\n' not in str(told.value) and len(str(told.value))<600 and str(told.value).isprintable()

def test_names_that_are_not_utf8(tmp_path):
    picture(tmp_path/'good'/'1.png')
    os.rename(tmp_path/'good'/'1.png', os.fsencode(tmp_path/'good')+b'/\xff.png')
    with pytest.raises(DataError, match=r"udcff.png': its name is not UTF-8") as told: read_folder(tmp_path)
    assert str(told.value).encode()

# ---------------------------------------------------------------- no substitute

@pytest.mark.parametrize('system,more,keys', [('fgclip', '--data.test_json null --data.test_annotation null', '--data.test_json, --data.test_annotation'), ('adatad', '--data.test null', '--data.test'), ('action_cls', '--data.test []', '--data.test'), ('uniad', '', '--data.test')])
def test_evaluation_without_test_data_is_an_error(cases, tmp_path, system, more, keys):
    "Never the planted defects, nor any other validation data, in place of what is not there"
    root = shutil.copytree(cases/'ad2_layout', tmp_path/'data')
    shutil.rmtree(root/'cable/test_public')
    data = load_config(f'{system}_demo', ['--data_root', str(root), *more.split()]).make_data()
    with pytest.raises(ConfigError, match=f'names no test data; set (one of )?{keys}$'): measured_split(data)
