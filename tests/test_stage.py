"What every world has from the stage: whole or absent, found again, never written over what is somebody else's"
import os, signal
from pathlib import Path
import pytest
from toy_system import processes
from vadnb.core import DataError, read_json, write_json
from vadnb.worlds.street import street_world
from vadnb.worlds.textures import texture_world

street = dict(videos=1, valid_videos=1, test_videos=1, frames=(32, 34), size=(48, 64))
textures = dict(classes=['wood'], train=2, good=1, defective=1, size=(32, 32))
worlds = dict(street_world=(street_world, street, 'synthetic world'),
              texture_world=(texture_world, textures, 'world of textures'))
each_world = pytest.mark.parametrize('make,arguments,noun', worlds.values(), ids=worlds)

def contents(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}

def second_time(rows):
    "A progress that is never asked for"
    raise AssertionError('a finished world is drawn again')

@each_world
def test_a_finished_world_is_reused(tmp_path, make, arguments, noun):
    world = make(tmp_path/'w', **arguments)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'w').rglob('*')}
    assert make(tmp_path/'w', progress=second_time, **arguments)==world
    assert before=={p: p.stat().st_mtime_ns for p in (tmp_path/'w').rglob('*')}
    # an empty folder is a place like any other, and a world lies in it as it lies elsewhere
    (tmp_path/'empty').mkdir()
    again = contents(make(tmp_path/'empty', **arguments).root)
    assert [*again.values()]==[*contents(world.root).values()]

@each_world
def test_an_interruption_leaves_nothing(tmp_path, make, arguments, noun):
    def interrupted(rows):
        yield from rows[:2]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make(tmp_path/'w', progress=interrupted, **arguments)
    assert not list(tmp_path.iterdir())
    assert make(tmp_path/'w', **arguments).missing()==[]

def make_and_die(make, folder, arguments):
    "For another process: killed before the last thing is drawn"
    def killed(rows):
        yield from rows[:-1]
        os.kill(os.getpid(), signal.SIGKILL)
    make(folder, progress=killed, **arguments)

@each_world
def test_a_kill_leaves_nothing_that_passes_for_a_world(tmp_path, make, arguments, noun):
    "Killed before the last thing is drawn: no folder of that name, and what lies about is refused under its own name"
    child = processes.Process(target=make_and_die, args=(make, tmp_path/'w', arguments))
    child.start(); child.join(300)
    assert child.exitcode==-signal.SIGKILL and not (tmp_path/'w').exists()
    left, = tmp_path.iterdir()
    assert left.name.startswith('.w.') and any(left.iterdir()) and not (left/'world.json').exists()
    with pytest.raises(DataError, match=f'holds something that is no {noun}'): make(left, **arguments)
    assert make(tmp_path/'w', **arguments).missing()==[]

@each_world
def test_what_is_somebody_elses_is_refused_and_kept(tmp_path, make, arguments, noun):
    (tmp_path/'w').mkdir()
    (tmp_path/'w/thesis.txt').write_text('mine')
    with pytest.raises(DataError) as e: make(tmp_path/'w', **arguments)
    assert str(e.value)==f'{tmp_path}/w: holds something that is no {noun}; choose an empty or new folder'
    assert [p.name for p in (tmp_path/'w').iterdir()]==['thesis.txt']
    # a world of another kind is another world too
    theirs,given = (texture_world, textures) if make is street_world else (street_world, street)
    kept = contents(theirs(tmp_path/'theirs', **given).root)
    with pytest.raises(DataError, match='another world .*choose another folder, or delete this one'):
        make(tmp_path/'theirs', **arguments)
    assert contents(tmp_path/'theirs')==kept and sorted(p.name for p in tmp_path.iterdir())==['theirs', 'w']

@each_world
def test_a_missing_file_is_named(tmp_path, make, arguments, noun):
    world = make(tmp_path/'w', **arguments)
    (world.root/world.files()[-1]).unlink()
    with pytest.raises(DataError) as e: make(tmp_path/'w', **arguments)
    assert f'{world.files()[-1]}: missing from a finished world; delete {world.root} to make' in str(e.value)

@each_world
def test_a_progress_that_swallows_things_makes_no_world(tmp_path, make, arguments, noun):
    with pytest.raises(DataError, match='was not drawn; let progress pass on everything'):
        make(tmp_path/'w', progress=lambda rows: rows[:-1], **arguments)
    assert not list(tmp_path.iterdir())

@each_world
def test_the_slower_of_two_makers_finds_the_world_of_the_faster(tmp_path, make, arguments, noun):
    def overtaken(rows):
        yield from rows
        if not (tmp_path/'w').exists(): make(tmp_path/'w', **arguments)
    assert make(tmp_path/'w', progress=overtaken, **arguments).missing()==[]
    assert [p.name for p in tmp_path.iterdir()]==['w']

@each_world
def test_a_place_that_is_taken_meanwhile_is_left_alone(tmp_path, make, arguments, noun):
    def pushed(rows):
        yield from rows
        (tmp_path/'w').mkdir()
        (tmp_path/'w/diary.txt').write_text('mine')
    with pytest.raises(DataError, match=f'holds something that is no {noun}'):
        make(tmp_path/'w', progress=pushed, **arguments)
    assert [p.name for p in tmp_path.iterdir()]==['w'] and [p.name for p in (tmp_path/'w').iterdir()]==['diary.txt']

@each_world
@pytest.mark.parametrize('stamp', [[], {}, 3, None, {'arguments': []}, {'arguments': {}}, {'videos': []}])
def test_a_stamp_is_not_believed(tmp_path, make, arguments, noun, stamp):
    "Whatever JSON stands there is one line, never a traceback"
    (tmp_path/'w').mkdir()
    write_json(tmp_path/'w/world.json', stamp)
    with pytest.raises(DataError) as e: make(tmp_path/'w', **arguments)
    assert 'world.json: another world (' in str(e.value) and '\n' not in str(e.value)

@each_world
def test_a_rename_that_the_system_refuses_is_one_line(tmp_path, make, arguments, noun, monkeypatch):
    real = os.replace
    def refused(source, target):
        if Path(target)==tmp_path/'w': raise OSError(16, 'Device or resource busy')
        return real(source, target)
    monkeypatch.setattr(os, 'replace', refused)
    with pytest.raises(DataError) as e: make(tmp_path/'w', **arguments)
    busy = f'{tmp_path}/w: cannot be made (Device or resource busy)'
    assert str(e.value)==f'{busy}; choose a folder you may write to' and not list(tmp_path.iterdir())

def test_the_stamp_says_what_a_world_was_made_with(tmp_path):
    "The layout of stamps that lie on people's disks: arguments, and for a street its roster"
    said = read_json(street_world(tmp_path/'s', **street).root/'world.json')
    assert list(said)==['arguments', 'videos'] and said['arguments']['format']==2 and len(said['videos'])==3
    assert read_json(texture_world(tmp_path/'t', **textures).root/'world.json')==dict(arguments=dict(
        planting=1, classes=['wood'], train=2, good=1, defective=1, size=[32, 32], shift=None, seed=0))
