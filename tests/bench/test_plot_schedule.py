"""The drawing of schedules: its text, its picture, and what it refuses."""

import matplotlib.pyplot as plt
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


def test_bars_stand_where_the_clock_says_and_panels_share_its_scale(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    costs = ["--forward_cost", "3", "--backward_cost", "4"]
    sizes = ["--pp", "2", "--micro_batches", "1"]
    plot_schedule.main(["--schedule", "gpipe", "zero-bubble", *sizes, *costs, "--out", str(tmp_path / "out.png")])
    bars = [
        sorted((round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width()) for bar in panel.patches)
        for panel in figures[0].axes
    ]
    # (stage, start, length): down 3 + 3, back up 4 + 4; a backward in two halves lets the stage before begin earlier
    assert bars[0] == [(0, 0, 3), (0, 10, 4), (1, 3, 3), (1, 6, 4)]
    assert bars[1] == [(0, 0, 3), (0, 8, 2), (0, 10, 2), (1, 3, 3), (1, 6, 2), (1, 8, 2)]
    assert [panel.get_xlim() for panel in figures[0].axes] == [(0, 14), (0, 14)]


@pytest.mark.parametrize("flag", ["--pp", "--micro_batches", "--virtual_stages", "--forward_cost"])
def test_sizes_that_draw_nothing_are_refused_by_name(flag, capsys):
    with pytest.raises(SystemExit):
        plot_schedule.main([flag, "0"])
    assert f"{flag} 0" in capsys.readouterr().err
