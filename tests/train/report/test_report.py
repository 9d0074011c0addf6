"""The report: what it groups, what it says, and that its numbers are those of the runs."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from powernap.launch import cli
from powernap.parallel.planning.work import segments_of, step_flops
from powernap.train.outputs import OutputError
from powernap.train.recipe_file import load_recipe
from powernap.train.report import figures
from powernap.train.report.runs import differing_fields, group_runs, read_runs
from powernap.train.report.write import write_report
from powernap.train.run.folder import RunFolder, save_recipe, work_of
from powernap.train.tracking.metrics import MetricsLog
from tests.helpers import browser, runs
from tests.helpers.cases import names

DEPTHS = ("1", "2", "4")
VOID = {"meta", "link", "br", "path", "use", "line", "rect"}


def make_run(
    root, name, *overrides, level=0.9, passes=("1", "4"), evaluated=True, steps=40, task="depo", nodes=8, flops=None
):
    """A run's folder as training and evaluation leave it, with accuracies that only this run has."""
    data = root / f"data-{task}-{nodes}"
    data.mkdir(exist_ok=True)
    (data / "train-0.tar").touch()
    (data / "manifest.json").write_text(json.dumps({"task": task, "fields": {"nodes": nodes}}))
    recipe = load_recipe(
        "demo", [f"run.name={name}", f"run.root={root}", f"data.train={data}/train-*.tar", "train.steps=40", *overrides,
                 "optimizer.warmup_steps=4"],
    )  # fmt: skip
    folder = root / name
    folder.mkdir()
    save_recipe(recipe, folder / "config.yaml")
    origin = {"date": "2026-01-02", "commit": "abcdef1234567890", "uncommitted_changes": False,
              "machine": {"cpu": "A CPU", "cores": 2, "gpu": None, "torch": "2.13"}}  # fmt: skip
    (folder / "origin.json").write_text(json.dumps(origin))
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(1, steps + 1):
            more = {"passes": recipe.sleep.pass_choices[step % len(recipe.sleep.pass_choices)]}
            if flops:
                more["flops"] = flops(step)
            log.write(
                step,
                loss=level + 4 / step,
                grad_norm=1,
                lr=1,
                tokens=3408,
                seconds=0.5,
                peak_memory_bytes=10**9,
                **more,
            )
    if evaluated:
        accuracy = {n: {d: level / (1 + 0.1 * int(d)) - 0.01 * int(n) for d in DEPTHS} for n in passes}
        interval = {n: {d: [v - 0.031, v + 0.027] for d, v in by_depth.items()} for n, by_depth in accuracy.items()}
        evaluation = {
            "step": steps, "loss": dict.fromkeys(passes, level / 3), "accuracy": accuracy, "interval": interval,
            "floor": {d: 0.125 for d in DEPTHS}, "guesses": {"constant": {d: 0.125 for d in DEPTHS}}, "answers": dict.fromkeys(DEPTHS, 600), "sequences": dict.fromkeys(DEPTHS, 90),
        }  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [
        make_run(root, "sleep-s0", level=0.95),
        make_run(root, "sleep-s1", "run.seed=1", level=0.91),
        make_run(root, "sleep-s2", "run.seed=2", level=0.97),
        make_run(root, "n1", "sleep.passes=1", level=0.45),
        make_run(root, "new_one", "sleep.write=last", evaluated=False, steps=25),
    ]


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    to = tmp_path_factory.mktemp("report")
    files = write_report(folders, to, "Sleep & others")
    return (to / "report.html").read_text(), (to / "report.md").read_text(), files


class Page(HTMLParser):
    """Tags that match, the text, tables as lists of rows, and what the page refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tables, self.links, self.images, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "svg":
            self.images.append(attributes)
        self.links += [attributes[name] for name in ("href", "src", "xlink:href", "srcset") if name in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open[-3:-1] and any(tag in ("td", "th") for tag in self.open[-2:]):
            self.tables[-1][-1][-1] += data


def test_the_page_is_whole_and_needs_nothing_else(written, folders):
    html, _, _ = written
    page = Page(html)
    assert page.open == [] and "<script" not in html
    assert [link for link in page.links if not link.startswith("#")] == ["https://arxiv.org/abs/2605.26099"]
    assert set(re.findall(r"https?://[\w.]+", html)) == {"https://arxiv.org"}
    assert (
        "prefers-color-scheme: dark" in html
        and "@import" not in html
        and "url(" not in re.sub(r"url\(#\w+\)", "", html)
    )
    assert len(page.images) == 6 and all(len(image["aria-label"]) > 20 for image in page.images)
    for folder in folders:
        assert str(folder) in html
    assert "<title>Sleep &amp; others</title>" in html
    assert f"powernap eval {folders[-1]}" in html and "25 of 40 steps" in html


def test_references_inside_the_pictures_are_there(written):
    html, _, _ = written
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', html))
    defined = re.findall(r' id="([\w.-]+)"', html)
    assert used and used <= set(defined)


def test_numbers_are_those_of_the_runs(written, folders):
    html, markdown, _ = written
    tables = Page(html).tables
    by_run = next(table for table in tables if any(str(folders[0]) in row[0] for row in table) and table[0][1] == "N")
    for folder in folders[:4]:
        saved = json.loads((folder / "evaluation.json").read_text())
        rows = [row for row in by_run if row[0] == str(folder)]
        assert [row[1] for row in rows] == ["1", "4"]
        for row in rows:
            for place, depth in enumerate(DEPTHS, start=2):
                value, (low, high) = saved["accuracy"][row[1]][depth], saved["interval"][row[1]][depth]
                assert row[place].split() == [f"{100 * value:.1f}", f"[{100 * low:.1f},", f"{100 * high:.1f}]"]
                assert f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in markdown
            assert row[-1] == f"{saved['loss'][row[1]]:.4f}"


def test_seeds_are_a_mean_and_a_range_and_a_single_run_an_interval(written, folders):
    groups = Page(written[0]).tables[0]
    levels = [100 * (level / 1.4 - 0.04) for level in (0.95, 0.91, 0.97)]
    names = [row[0] for row in groups]
    assert names == ["", "sleep", "n1", "new_one", "surface guess"]
    assert groups[1][2].split() == ["3", "(0,", "1,", "2)"]
    assert groups[1][1].split() == [f"{sum(levels) / 3:.1f}", f"{min(levels):.1f}–{max(levels):.1f}"]
    assert groups[2][1].split()[1].startswith("[")
    assert groups[3][1] == "-" and groups[4][1] == "12.5"


def test_cost_is_counted_from_recipe_and_metrics(tmp_path):
    folder = make_run(tmp_path, "several", "sleep.passes=[1,4]", evaluated=False)
    (run,) = read_runs([folder])
    one, four = (step_flops(r, segments_of(r)) for r in (load_recipe("demo", [f"sleep.passes={n}"]) for n in (1, 4)))
    assert run.flops == 20 * one + 20 * four and one < four
    assert run.seconds == 20 and run.tokens_per_second == 3408 / 0.5
    assert run.parameters == 110_824 and run.peak_memory == 10**9


def test_a_runs_flops_are_those_it_wrote_down_wherever_its_shards_are(tmp_path, monkeypatch):
    """They were looked for from the folder that the report is called in: 43.3G or 24.0G for the same demo."""
    run = make_run(tmp_path, "mine", "data.train=data/demo/train-*.tar", evaluated=False)
    recipe = load_recipe("demo")
    at_start = [False, True, True, True]
    RunFolder(run).write_work(work_of(recipe, [at_start], []) | {"task": "depo", "fields": {"nodes": 8}})
    found = []
    for place in (tmp_path, tmp_path.parent):
        monkeypatch.chdir(place)
        (read,) = read_runs([run])
        found.append((read.step_flops(4), read.windows_known, read.task, read.fields(with_task=True)["task.nodes"]))
    assert found == [(step_flops(recipe, segments_of(recipe, at_start)), True, "depo", 8)] * 2
    assert found[0][0] < step_flops(recipe, segments_of(recipe))  # where the windows of answers would be slept on
    RunFolder(run).work.unlink()  # as an older version left it
    (read,) = read_runs([run])
    assert (read.step_flops(4), read.windows_known) == (step_flops(recipe, segments_of(recipe)), False)
    files = write_report([run], tmp_path / "report")
    assert "FLOPs of mine assume that only the last window predicts" in files[1].read_text()


def test_flops_are_those_of_each_step_as_the_run_wrote_them(tmp_path):
    """As after a resume with another train.recompute, which writes work.json anew."""
    run = make_run(tmp_path, "mine", evaluated=False, flops=lambda step: 100 if step <= 10 else 70)
    RunFolder(run).write_work(work_of(load_recipe("demo"), [[False, False, False, True]], []))
    (read,) = read_runs([run])
    assert read.flops == 10 * 100 + 30 * 70 and read.flops_until[9:11] == [1000, 1070]


def test_equal_steps_and_equal_flops_stand_side_by_side(tmp_path):
    """The one with half the FLOPs a step has done twice the steps at equal FLOPs."""
    dear = make_run(tmp_path, "dear", "sleep.passes=4", level=0.5, flops=lambda step: 20)
    cheap = make_run(tmp_path, "cheap", "sleep.passes=1", level=0.9, flops=lambda step: 10)
    markdown = write_report([dear, cheap], tmp_path / "report")[1].read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("|")]
    start = next(number for number, row in enumerate(rows) if row[1].startswith("loss after"))
    assert rows[start] == ["", "loss after 40 steps", "FLOPs by then", "loss after 400 FLOPs", "steps by then"]
    loss = lambda level, step: f"{level + 4 / step:.4f}"  # noqa: E731
    assert rows[start + 2 : start + 4] == [
        ["dear", loss(0.5, 40), "800", loss(0.5, 20), "20"],
        ["cheap", loss(0.9, 40), "400", loss(0.9, 40), "40"],
    ]


def drawn(picture):
    """The lines of a picture: label -> (x values, y values)."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    picture.draw(axes)
    return {line.get_label(): tuple(list(map(float, values)) for values in line.get_data()) for line in axes.lines}


def test_positions_are_values_and_captions_say_what_is_drawn(folders, tmp_path):
    groups = group_runs(read_runs(folders))[:2]
    styles = figures.styles_of(groups)
    by_depth = drawn(figures.accuracy_by_depth(groups, list(DEPTHS), "hops", styles))
    assert by_depth["sleep (N=4)"][0] == [1, 2, 4] and by_depth[figures.FLOOR_LABEL][1] == [0.125] * 3
    picture = figures.accuracy_by_passes(groups, "4", "hops", styles)
    assert drawn(picture)["sleep"][0] == [1, 4]
    assert "A ring marks the N" in picture.caption and "floor differs" not in picture.caption
    assert min(drawn(picture)[figures.FLOOR_LABEL][0]) > 0  # on a logarithmic axis
    by_step, by_flops = figures.loss_curves(groups, styles)
    assert drawn(by_step)["n1"][0] == list(range(1, 41))
    assert drawn(by_flops)["n1"][0] == [float(f) for f in groups[1].runs[0].flops_until]


def test_the_floor_of_tests_that_differ_is_the_highest(tmp_path):
    runs = [make_run(tmp_path, name, *more) for name, more in {"a": (), "b": ("sleep.passes=1",)}.items()]
    evaluation = json.loads((runs[1] / "evaluation.json").read_text())
    (runs[1] / "evaluation.json").write_text(json.dumps(evaluation | {"floor": {d: 0.25 for d in DEPTHS}}))
    groups = group_runs(read_runs(runs))
    picture = figures.accuracy_by_cost(groups, "4", "hops", figures.styles_of(groups))
    assert drawn(picture)[figures.FLOOR_LABEL][1] == [0.25, 0.25]
    assert "its line is the highest" in picture.caption


@browser.needs_chromium
@pytest.mark.parametrize("width", names([800], [1280, 800]))
def test_nothing_runs_out_of_the_page(written, tmp_path, width):
    say = "document.title = `${document.documentElement.scrollWidth} of ${window.innerWidth}`"
    page = tmp_path / "page.html"
    page.write_text(written[0].replace("</body>", f"<script>{say}</script></body>"))
    assert f"<title>{width} of {width}</title>" in browser.source_of(page.as_uri(), tmp_path / "browser", width)


def test_an_evaluation_whose_floor_is_a_constant_only_is_reported(tmp_path):
    run = make_run(tmp_path, "old")
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["guesses"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text = write_report([run], tmp_path / "report")[1].read_text()
    assert "evaluated by an older version, whose surface guess is the best constant only" in text


def test_the_main_figures_are_of_the_trained_passes_or_the_most_evaluated(tmp_path):
    trained, other = (make_run(tmp_path, "_".join(passes), passes=passes) for passes in (("4", "1"), ("8", "16", "2")))
    assert [run.read_passes for run in read_runs([trained, other])] == ["4", "16"]


def test_groups_are_runs_of_one_recipe(folders):
    groups = group_runs(read_runs(folders))
    assert [group.label for group in groups] == ["sleep", "n1", "new_one"]
    assert differing_fields(groups) == ["sleep.passes", "sleep.write"]


def test_sizes_of_the_task_tell_groups_apart(tmp_path):
    groups = group_runs(read_runs([make_run(tmp_path, "a-s0", nodes=8), make_run(tmp_path, "a-s1", nodes=9)]))
    assert len(groups) == 2 and differing_fields(groups) == ["task.nodes"]


def test_markdown_tables_are_well_formed_and_pictures_are_there(written):
    _, markdown, files = written
    block, tables = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
        elif block:
            tables.append(block)
            block = []
    assert len(tables) == 8
    for table in tables:
        assert len({line.count("|") for line in table}) == 1 and re.fullmatch(r"\|(-+:?\|)+", table[1])
    named = re.findall(r"!\[[^\]]+\]\((.+?)\)", markdown)
    assert named == [file.name for file in files[2:]] and len(named) == 6
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[2:])


def test_colours_can_be_told_from_both_pages():
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for color in (*figures.COLORS, figures.FLOOR):  # WCAG 2.2: at least 3 for graphics
        for page in ("#ffffff", "#14181d"):
            light, dark = sorted((luminance(color), luminance(page)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 3.5


def test_a_run_of_text_is_compared_by_its_loss(tmp_path):
    folder = make_run(tmp_path, "text", task="text")
    evaluation = {
        "step": 40,
        "loss": {"1": 2.5, "4": 2.25},
        "accuracy": {"1": {}, "4": {}},
        "interval": {"1": {}, "4": {}},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation | {"floor": {}, "answers": {}, "sequences": {}}))
    write_report([folder], tmp_path / "report")
    tables = Page((tmp_path / "report" / "report.html").read_text()).tables
    assert [["", "N=1", "N=4"], ["text", "2.5000", "2.2500"]] in tables


def test_what_cannot_be_compared_is_told_in_one_line(tmp_path, folders, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = make_run(tmp_path, "other", task="rule110")
    for arguments, words in (
        (["nothing"], ["no run 'nothing'"]),
        ([str(folders[0]), str(folders[0])], ["is named twice"]),
        ([str(folders[0]), str(other)], ["is of task depo", "of rule110"]),
    ):
        assert cli.main(["report", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert all(word in line for word in words), line
    assert not (tmp_path / "runs").exists()
    assert cli.main(["report", *map(str, folders), "--to", "here"]) == 0
    assert (tmp_path / "here" / "report.html").is_file()


def test_no_run_is_an_error(tmp_path):
    result = runs.warm_powernap("report", cwd=tmp_path)
    assert result.returncode == 2 and "required: RUN" in result.stderr


def test_where_a_report_goes_is_checked_before_the_runs_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("powernap.train.report.write.read_runs", lambda _: pytest.fail("read too early"))
    (tmp_path / "file").touch()
    for to in (tmp_path / "file", tmp_path / "file" / "report", Path("/proc/report")):
        with pytest.raises(OutputError, match=f"--to {to}: .*: choose another"):
            write_report([], to)


def test_what_a_run_began_with_and_what_changed(tmp_path):
    folder = make_run(tmp_path, "later", evaluated=False)
    origin = json.loads((folder / "origin.json").read_text())
    started = {"folder": "runs/n1/checkpoints/step_00000010", "step": 10}
    (folder / "origin.json").write_text(json.dumps(origin | {"started_from": started}))
    lines = [{"step": 0, "started_from": started}, {"step": 20, "changes": {"train.steps": [30, 40]}}]
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    write_report([folder], tmp_path / "report", "One")
    page = (tmp_path / "report" / "report.md").read_text()
    assert f"{folder} began with the weights of runs/n1/checkpoints/step_00000010, step 10." in page
    assert f"{folder} after step 20: train.steps: 30 to 40." in page
    (folder / "origin.json").write_text(json.dumps(origin | {"started_from": started | {"branch": True}}))
    write_report([folder], tmp_path / "again", "One")
    assert (
        f"{folder} continues runs/n1/checkpoints/step_00000010, step 10."
        in (tmp_path / "again" / "report.md").read_text()
    )
