"Pictures of strangers: which formats are opened at all, and how large they may be, by whichever way they come in"
import os
import numpy as np, pytest
from PIL import EpsImagePlugin, Image
from vadnb.core import DataError, VideoError
from vadnb.data.anomaly_images import open_image
from vadnb.data.image_files import MAX_PIXELS, limit_pixels
from vadnb.data.video import VideoReader
from vadnb.data.video_writing import write_video

@pytest.fixture
def small():
    "A limit of 1,000 pixels"
    limit_pixels(1000)
    yield
    limit_pixels(MAX_PIXELS)

def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    "An EPS under the name of a PNG: in a data set, and as a frame of a video"
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *args, **kw: pytest.fail('Ghostscript was started'))
    page = tmp_path/'frames'/'img_00001.png'
    page.parent.mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path/'page.eps')
    page.write_bytes((tmp_path/'page.eps').read_bytes())
    with pytest.raises(DataError, match='img_00001.png cannot be decoded .* no PNG, JPEG, BMP, TIFF, WEBP image'): open_image(page)
    with pytest.raises(VideoError, match='img_00001.png: cannot be read as a picture'): VideoReader(page.parent)

def test_pictures_and_videos_have_a_size_limit(tmp_path, small):
    Image.new('L', (40, 26)).save(tmp_path/'large.png'); Image.new('L', (40, 25)).save(tmp_path/'fits.png')
    assert open_image(tmp_path/'fits.png').size==(40, 25)
    says = r"has 40x26 pixels, more than 'data.max_pixels' allows \(1,000\); shrink it, or raise the limit"
    with pytest.raises(DataError, match='m.json, line 1: .*large.png: '+says): open_image(tmp_path/'large.png', 'm.json, line 1')
    (tmp_path/'frames').mkdir()
    os.rename(tmp_path/'large.png', tmp_path/'frames'/'img_1.png')
    with pytest.raises(VideoError, match=says): VideoReader(tmp_path/'frames')
    limit_pixels(10**6)
    write_video(tmp_path/'v.mp4', np.zeros((3, 64, 48, 3), np.uint8), 10)
    limit_pixels(3071)
    with pytest.raises(VideoError, match="v.mp4: has 48x64 pixels, more than 'data.max_pixels' allows"): VideoReader(tmp_path/'v.mp4')
    limit_pixels(3072)
    assert VideoReader(tmp_path/'v.mp4').get_batch([2]).shape==(1, 64, 48, 3)
