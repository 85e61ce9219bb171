"""The drawing of schedules: its text, its picture, and what it refuses."""

import pytest
from PIL import Image

from heiretsu.bench import plot_schedule


def test_picture_and_text_of_every_schedule(tmp_path, capsys):
    out = tmp_path / "timeline.png"
    names = ["gpipe", "1f1b", "interleaved", "zero-bubble"]
    plot_schedule.main(["--schedule", *names, "--pp", "2", "--micro_batches", "3", "--out", str(out)])
    printed = capsys.readouterr().out
    assert [line.split(",")[0] for line in printed.splitlines() if ", pp=2" in line] == names
    assert "bubble 25.0%" in printed and f"wrote {out}" in printed
    picture = Image.open(out)
    assert picture.width == 1440
    colours = {colour for _, colour in picture.convert("RGB").getcolors(picture.width * picture.height)}
    for shades in plot_schedule.COLOURS.values():
        assert tuple(bytes.fromhex(shades[0][1:])) in colours


@pytest.mark.parametrize("flag", ["--pp", "--micro_batches", "--virtual_stages", "--forward_cost"])
def test_sizes_that_draw_nothing_are_refused_by_name(flag, capsys):
    with pytest.raises(SystemExit):
        plot_schedule.main([flag, "0"])
    assert f"{flag} 0" in capsys.readouterr().err
