"""The table of stages 1."""

from many_runs import learned, line_of


def test_stages_1_are_compared_without_any_policy(runs):
    """As in a sweep with --stages 1."""
    for width, shift in (("8", 0.0), ("16", 0.25)):
        options = ["--model.wm_width", width, "--stage2.lr", f"1e-{width}"]  # the latter changes nothing
        for seed in (0, 1):
            metrics = learned(0.125 * (1 + seed) + shift, 0.5 + seed / 8)
            runs.write(f"w{width}", "maze", seed, "stage1", metrics, options=options, took=60)
    found = runs.compare("--exp", "w8", "w16")
    assert [(each["values"], each["seeds"]) for each in found["stage1"]] == [
        ({"model.wm_width": width}, [0, 1]) for width in ("8", "16")
    ]
    assert "- w8: 2 of 2 stages 1 (1 game × 2 seeds), complete" in runs.text
    narrow, wide = found["stage1"]
    assert narrow["means"] == {"error": 0.375, "probe": 0.5625, "perplexity": 8.0, "minutes": 1.0}
    assert narrow["stderrs"] == {"error": 0.125, "probe": 0.0625, "perplexity": 0.0, "minutes": 0.0}
    assert wide["means"]["error"] == 0.875
    head = line_of(runs.text, "| game", "probe")
    assert head == ["game", "model.wm_width", "seeds", "error", "probe", "perplexity", "minutes"]
    cells = ["maze", "8", "2", "0.375 ± 0.125", "56.2% ± 6.2%", "8.0 ± 0.0", "1.0 ± 0.0"]
    assert line_of(runs.text, "| maze", "| 8 ") == cells


def test_stages_1_without_a_quantiser_have_no_perplexity(runs):
    runs.write("a", "maze", 0, "stage1", learned(0.25, 0.5), options=["--vq.enabled", "false"])
    runs.write("a", "maze", 1, "stage1")  # unfinished
    runs.write("b", "maze", 0, "stage1", learned(0.5, 0.5), options=["--vq.enabled", "false"])
    found = runs.compare("--exp", "a", "b")
    assert [(each["experiment"], each["means"]["error"]) for each in found["stage1"]] == [
        ("a", 0.5),
        ("b", 1.0),
    ]
    assert "perplexity" not in line_of(runs.text, "| game", "probe")
    assert "- a: 1 of 2 stages 1 (1 game × 2 seeds), **not complete**" in runs.text
    runs.compare("--exp", "a", "--seeds", "0,1,2")
    assert "- a, maze, seed 2, stage1: missing" in runs.text
