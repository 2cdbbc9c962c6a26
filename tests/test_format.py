"""Numbers, times and names as people read them."""

from configurator.format import human_count, human_seconds, plot_text


def test_counts():
    counts = (950, 1500, 2.5e6, 999.9e6, 1e9, 6.4e13, 2e15)
    assert [human_count(x) for x in counts] == ["950", "1.5K", "2.5M", "1B", "1B", "64T", "2e+15"]


def test_durations():
    hours = (1e-5, 1 / 360, 0.5, 20, 100, 1e4, 1e9)
    assert [human_seconds(3600 * h) for h in hours] == [
        "< 1 s", "10.0 s", "30.0 min", "20.0 h", "4.2 days", "416.7 days", "1.1e+05 years"]


def test_names_in_pictures_are_read_letter_by_letter():
    assert plot_text("a$x_{b$") == r"a\$x_{b\$"  # no formula, and one that matplotlib could not read
    assert plot_text("_draft")[-6:] == "_draft" and plot_text("_draft")[0] != "_"  # such labels are hidden
    assert plot_text("λ-测试 [1] 100%") == "λ-测试 [1] 100%"
    assert plot_text("a\tb\udcff") == r"a\tb\udcff"
