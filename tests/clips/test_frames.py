import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from mer_jax.clips.frames import read_frame, read_frames
from mer_jax.errors import UserError


@pytest.fixture(scope="module")
def picture():
    return np.ascontiguousarray(astronaut()[::4, 8::4])


def test_png_as_opencv_reads_it(tmp_path, picture):
    path = tmp_path / "1.png"
    cv2.imwrite(str(path), picture[..., ::-1])
    frame = read_frame(path)
    np.testing.assert_array_equal(frame, picture)
    assert frame.dtype == np.uint8
    assert frame.flags.writeable


def test_jpg_as_opencv_reads_it(tmp_path, picture):
    path = tmp_path / "1.jpg"
    Image.fromarray(picture).save(path, quality=90)
    difference = read_frame(path).astype(int) - cv2.imread(str(path))[..., ::-1]
    assert abs(difference).max() <= 3  # the decoders' inverse transforms round differently


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_usual_mode_becomes_rgb(tmp_path, picture, mode):
    path = tmp_path / ("1.jpg" if mode == "CMYK" else "1.png")
    image = Image.fromarray(picture).convert(mode)
    image.save(path)
    frame = read_frame(path)
    assert frame.shape == picture.shape
    if mode == "L":
        np.testing.assert_array_equal(frame, np.repeat(np.asarray(image)[..., None], 3, axis=2))
    if mode == "RGBA":
        np.testing.assert_array_equal(frame, picture)


def test_alpha_and_palette_transparency_are_dropped_in_silence(tmp_path, picture):
    rgba = np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_frame(tmp_path / "1.png"), picture)
    palette = Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE, colors=32)
    palette.save(tmp_path / "2.png", transparency=bytes(range(32)))
    np.testing.assert_array_equal(read_frame(tmp_path / "2.png"), np.asarray(palette.convert("RGB")))


def test_orientation_tags_are_not_applied(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(picture).save(tmp_path / "1.jpg", exif=exif)
    assert read_frame(tmp_path / "1.jpg").shape == picture.shape


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("kept", [0, 0.02, 0.5, 0.97])
def test_truncated(tmp_path, picture, suffix, kept):
    path = tmp_path / f"frame7.{suffix}"
    Image.fromarray(picture).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=rf"frame7\.{suffix}: cannot be read .*restore the file") as caught:
        read_frame(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"no picture at all", b"\xff\xd8\xff\xe0" + bytes(500), b"\x89PNG\r\n\x1a\n" + bytes(99)]
)
def test_garbage(tmp_path, content):
    path = tmp_path / "3.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"3\.jpg: cannot be read"):
        read_frame(path)


def test_missing_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"4\.jpg: no such frame"):
        read_frame(tmp_path / "4.jpg")
    with pytest.raises(UserError, match="cannot be read"):
        read_frame(tmp_path)


def test_sixteen_bit_grey(tmp_path):
    path = tmp_path / "5.png"
    cv2.imwrite(str(path), np.full((4, 4), 3000, np.uint16))
    with pytest.raises(UserError, match=r"5\.png: has more than 8 bits"):
        read_frame(path)


def test_read_frames_in_order_and_lazily(tmp_path, picture):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths[:2]):
        Image.fromarray(picture + np.uint8(index)).save(path)
    frames = read_frames(paths)
    np.testing.assert_array_equal(next(frames), picture)
    np.testing.assert_array_equal(next(frames), picture + np.uint8(1))
    with pytest.raises(UserError, match=r"2\.png"):
        next(frames)


def test_frame_of_another_size_is_named(tmp_path):
    for index, size in enumerate([(8, 6), (8, 6), (6, 8)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    with pytest.raises(UserError, match=r"2\.png: is 6 x 8 pixels while .*0\.png is 8 x 6; .*restore"):
        list(read_frames([tmp_path / f"{index}.png" for index in range(3)]))
