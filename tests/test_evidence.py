"""The evidence's machinery: models of equal size, rows, resuming, statistics, report."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_focus.errors import FocusConfigError, FocusDataError
from hf_focus.evidence_cli import main, run_group
from hf_focus.evidence_groups import GROUPS, QUICK, find_groups
from hf_focus.evidence_measure import forward, measure
from hf_focus.evidence_notes import NOTES, note_on
from hf_focus.evidence_plan import ACCURACY, FIRST_SEED, FIRST_TUNING_SEED, STEPS, Group
from hf_focus.evidence_report import counted, report, section, summary
from hf_focus.evidence_run import append, is_done, read_rows, run_rows
from hf_focus.evidence_targets import TARGETS
from hf_focus.evidence_tasks import TASKS, find_task
from hf_focus.evidence_train import Row, run_row
from hf_focus.evidence_variants import REFERENCE, TOLERANCE, VARIANTS, Sizes, build, count, find_variant

TINY = Row("k-step", "focus", {"elements": 4, "steps": 2}, {"width": 16}, steps=4, batch=4, examples=64)


def group(**changes: object) -> Group:
    return replace(
        Group(
            "tiny",
            4,
            "Tiny",
            "k-step",
            ("focus", "plain"),
            (ACCURACY, STEPS),
            settings={"elements": 4, "steps": 2},
            sizes={"width": 16},
            seeds=2,
            steps=3,
            batch=4,
            examples=64,
        ),
        **changes,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_built_with_as_many_parameters_trains_and_answers(name: str) -> None:
    task, sizes = find_task("k-step"), Sizes(width=32)
    model = build(task, task.settings, name, sizes, seed=0)
    wanted = count(build(task, task.settings, REFERENCE, sizes, seed=0))
    if VARIANTS[name].matched:
        assert abs(count(model) - wanted) <= TOLERANCE * wanted
    else:
        assert count(model) > (1 - TOLERANCE) * wanted
    batch = task.batch(2, torch.Generator().manual_seed(0), task.settings)
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    assert logits.shape == (*batch.labels.shape, task.vocabulary(**task.settings))
    logits.sum().backward()
    frozen = {path for path, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(path.endswith(VARIANTS[name].frozen) for path in frozen)
    assert bool(frozen) == bool(VARIANTS[name].frozen)
    # Position t must not see what comes after it, whatever the attention
    changed = batch.input_ids.clone()
    changed[:, -1] = 0
    after = model.eval()(input_ids=changed, use_cache=False).logits
    before = model(input_ids=batch.input_ids, use_cache=False).logits
    torch.testing.assert_close(after[:, :-1], before[:, :-1])


def test_a_variant_starts_the_same_for_the_same_seed() -> None:
    task = find_task("k-step")
    first, again, other = (
        build(task, task.settings, "focus", Sizes(width=16), seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_unknown_variants_and_groups_are_refused() -> None:
    with pytest.raises(FocusConfigError, match="plain"):
        find_variant("plane")
    with pytest.raises(FocusConfigError, match="all, recall"):
        find_groups(["quickly"])
    assert find_groups(["all", "recall"], QUICK) == list(QUICK.values())


def test_baselines_differ_from_the_plain_model_in_their_positions_alone() -> None:
    task = find_task("recall")
    names = ("plain", "plain, quarter rotated", "plain, last unrotated")
    models = [build(task, task.settings, name, Sizes(layers=2), 0).eval() for name in names]
    ids = torch.randint(0, 64, (2, 20))
    answers = [model(ids).logits for model in models]
    still = [model(ids, position_ids=torch.zeros(1, 20, dtype=torch.long)).logits for model in models]
    for model, answer, without in zip(models[1:], answers[1:], still[1:], strict=True):
        first, other = models[0].state_dict(), model.state_dict()
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)
        assert torch.equal(without, still[0])
        assert not torch.equal(answer, answers[0])
    assert not torch.equal(answers[1], answers[2])


def test_log_n_scales_the_logits() -> None:
    from hf_focus.evidence_attention import NEUTRAL_KEYS

    task = find_task("k-step")
    settings = task.with_settings({"queries": 4})
    scaled, plain = (build(task, settings, name, Sizes(width=16, layers=1), 0).eval() for name in ("log-n", "plain"))
    # Equal weights but for the width of the MLP: compare the attention alone
    plain.load_state_dict({n: t for n, t in scaled.state_dict().items() if "mlp" not in n}, strict=False)
    attention, other = scaled.model.layers[0].self_attn, plain.model.layers[0].self_attn
    x = torch.randn(1, NEUTRAL_KEYS + 1, 16, generator=torch.Generator().manual_seed(0))
    rotary = plain.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    difference_at = (attention(x, rotary, None)[0] - other(x, rotary, None)[0]).abs().amax(-1)[0]
    # One key has no choice, at `NEUTRAL_KEYS` keys the factor is one, elsewhere it is not
    assert difference_at[0] < 1e-6
    assert difference_at[NEUTRAL_KEYS - 1] < 1e-6
    assert difference_at[5] > 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_adaptive_span_reads_what_its_mask_weighs_whatever_the_block(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_focus import evidence_attention

    monkeypatch.setattr(evidence_attention, "RAMP", 3)
    monkeypatch.setattr(evidence_attention, "QUERIES", 4)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, n, 8, generator=generator, dtype=torch.float64) for n in (13, 19, 19))
    spans = torch.tensor([0.1, 0.3], dtype=torch.float64)
    module = torch.nn.Module()
    module.is_causal, module.evidence_max_span = causal, 16
    module.evidence_span = torch.nn.Parameter(spans.clone())
    shown = torch.ones(2, 1, 13, 19, dtype=torch.bool)
    shown[1, :, :, :2] = False
    output, _ = evidence_attention.spanned_attention(module, query, key, value, shown, scaling=0.5)

    # Softmax with weights: m·exp(logit) over its sum, of every pair
    span = spans.clone().requires_grad_()
    distance = torch.arange(6, 19)[:, None] - torch.arange(19)
    weight = ((3 + 16 * span[:, None, None] - distance.abs()) / 3).clamp(0, 1) * shown
    if causal:
        weight = weight * (distance >= 0)
    likely = weight * (0.5 * query @ key.mT).exp()
    expected = (likely / likely.sum(-1, keepdim=True) @ value).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert span.grad.abs().min() > 1e-3
    torch.testing.assert_close(module.evidence_span.grad, span.grad)


def test_a_row_is_reproducible_and_tells_everything() -> None:
    first, again = run_row(TINY), run_row(TINY)
    untimed = [{k: v for k, v in record.items() if k != "seconds"} for record in (first, again)]
    assert untimed[0] == untimed[1]
    assert json.loads(json.dumps(untimed[0]))["results"] == first["results"]
    assert first["settings"] == {"elements": 4, "steps": 2, "queries": 8}
    assert set(first["results"]["train"]["by_group"]) == {"1", "2"}
    assert first["focus"]["max_span"] == 64
    assert first["steps_made"] == 4


def test_a_row_that_is_solved_stops() -> None:
    easy = replace(TINY, settings={"elements": 2, "steps": 1}, steps=400, batch=32, until_solved=True, examples=256)
    record = run_row(easy)
    assert record["steps_to_solved"] is not None
    assert record["steps_made"] < 400
    assert record["results"]["train"]["accuracy"] > 0.98


def test_measuring_counts_right_answers_by_group_and_restores_the_mode() -> None:
    class Copy(torch.nn.Module):
        """Answers each token with itself."""

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            logits = torch.nn.functional.one_hot(input_ids[..., 0], 32).float()
            return type("Out", (), {"logits": logits})

    task, model = find_task("k-step"), Copy().train()
    settings = task.with_settings({"elements": 3, "steps": 2, "queries": 1})
    found = measure(model, task, settings, torch.Generator().manual_seed(0), 256)
    batch = task.batch(256, torch.Generator().manual_seed(0), settings)
    right = batch.input_ids[:, -1, 0] == batch.labels[:, -1]
    assert found["accuracy"] == pytest.approx(right.float().mean().item())
    assert found["exact"] == found["accuracy"]
    for k in (1, 2):
        assert found["by_group"][str(k)] == pytest.approx(right[batch.groups[:, -1] == k].float().mean().item())
    assert model.training


def test_finished_rows_are_skipped_and_half_lines_dropped(tmp_path: Path) -> None:
    path, lines = tmp_path / "results" / "tiny.jsonl", []
    rows = [TINY, replace(TINY, seed=1)]
    assert run_rows(rows[:1], path, say=lines.append) == 0
    with path.open("a") as file:
        file.write('{"task": "k-st')
    assert len(read_rows(path)) == 1
    assert run_rows(rows, path, say=lines.append) == 0
    assert [record["seed"] for record in read_rows(path)] == [0, 1]
    assert any("1 of 2 rows are there" in line for line in lines)
    assert run_rows([replace(TINY, seed=2)], path, limit_seconds=-1, say=lines.append) == 1
    path.write_text("no json\n" + path.read_text())
    with pytest.raises(FocusDataError, match="no JSON"):
        read_rows(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"lr": 1e-3},
        {"variant": "anchored"},
        {"variant": "plain"},
        {"variant": "plain, normalized"},
        {"settings": {"steps": 1}},
    ],
)
def test_another_row_is_not_done(changes: dict[str, object]) -> None:
    assert is_done(TINY, [TINY.key])
    assert not is_done(replace(TINY, **changes), [TINY.key])


def test_norms_of_the_model_itself_make_another_row() -> None:
    rows = [replace(TINY, variant=name) for name in ("plain", "plain, normalized")]
    assert [[is_done(row, [other.key]) for other in rows] for row in rows] == [[True, False], [False, True]]


def test_a_setting_that_came_later_does_not_undo_a_row() -> None:
    older = TINY.key
    del older["focus"]["stop"]
    del older["settings"]["queries"]
    assert is_done(TINY, [older])
    assert not is_done(replace(TINY, settings={**TINY.settings, "queries": 1}), [older])
    # What it had was the default, and not what a variant asks for now
    del older["focus"]["mix_start"]
    assert not is_done(TINY, [older])
    assert is_done(replace(TINY, variant="even start"), [older])


def test_append_drops_what_a_killed_run_left(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": 2')
    append(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_learning_rates_are_chosen_on_seeds_that_do_not_count(tmp_path: Path) -> None:
    tuned = group(rates=(1e-3, 3e-3), seeds=1)
    assert run_group(tuned, tmp_path, "cpu") == 0
    records = read_rows(tmp_path / "results" / "k-step.jsonl")
    assert sorted({record["seed"] for record in records}) == [FIRST_TUNING_SEED, FIRST_SEED]
    for record in records:
        if FIRST_TUNING_SEED <= record["seed"] < FIRST_SEED:
            good = (record["variant"] == "focus") == (record["lr"] == 1e-3)
            record["results"]["train"]["accuracy"] = 0.9 if good else 0.1
    assert tuned.choose_rates(records) == {"focus": 1e-3, "plain": 3e-3}
    shown = counted(tuned, records)
    assert set(shown["focus"]) <= {FIRST_SEED}
    # By the steps that were made, where these tell rates apart; else by what comes next
    by_steps = replace(tuned, chosen_by=(STEPS, ACCURACY))
    for record in records:
        fast = record["variant"] == "focus" and record["lr"] == 3e-3
        record["steps_to_solved"] = 0 if fast else None
    assert by_steps.choose_rates(records) == {"focus": 3e-3, "plain": 3e-3}


def test_the_report_is_made_from_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = group()
    monkeypatch.setitem(GROUPS, "tiny", tiny)
    assert main(["tiny", "--output", str(tmp_path)]) == 0
    page = (tmp_path / "REPORT.md").read_text()
    assert "### Tiny" in page
    assert (tmp_path / "tiny.png").stat().st_size > 1000
    records = read_rows(tmp_path / "results" / "k-step.jsonl")
    mean = 100 * sum(r["results"]["train"]["accuracy"] for r in records if r["variant"] == "focus") / 2
    assert f"| {mean:.1f} [" in page or f"| {mean:.3f} [" in page
    assert main(["--report", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "REPORT.md").read_text() == page
    assert section(tiny, {}) == "### Tiny\n\nNot measured yet."
    more = replace(tiny, variants=(*tiny.variants, "log-n", "static span"))
    absent = "; ".join(VARIANTS[name].title for name in more.variants[2:])
    assert f"\n\nNot measured yet: {absent}.\n\n" in section(more, counted(more, records))
    assert "Not measured yet" not in section(tiny, counted(tiny, records))
    assert "Not measured yet." in report(tmp_path / "nothing")


def test_the_page_begins_with_what_became_of_the_targets() -> None:
    table = summary({name: {} for name in GROUPS})
    assert summary({"recall": {}}).startswith("2 targets: 2 not measured.")
    assert table.startswith(f"{len(TARGETS)} targets: {len(TARGETS)} not measured.")
    assert table.count("\n") == len(TARGETS) + 3
    assert "**4. Hierarchical reasoning**" in table


def test_quick_rows_and_those_of_other_text_have_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    book = tmp_path / "a book.txt"
    book.write_text("A short line.\n" * 3000)
    tiny = {"rates": (3e-3,), "seeds": 2, "steps": 2, "batch": 2, "examples": 2, "sizes": {"width": 16}}
    other = replace(GROUPS["text-patched"], **tiny, pretrain=0, settings={"length": 16}, variants=("focus", "plain"))
    monkeypatch.setattr("hf_focus.evidence_cli.QUICK", {"text": other, "tiny": group()})
    committed = tmp_path / "committed"
    book.with_name("short.txt").write_text("A short line.\n")
    with pytest.raises(FocusDataError, match="more than"):
        main(["--quick", "--dataset", str(book.with_name("short.txt"))])
    assert main(["--quick", "--dataset", str(book)], folder=committed) == 0
    folder = tmp_path / "outputs" / "evidence-quick-a-book-txt"
    assert [path.name for path in (folder / "results").iterdir()] == ["text.jsonl"]
    page = (folder / "REPORT.md").read_text()
    assert "dataset a book.txt" in page
    assert "decide nothing" in page
    assert str(tmp_path) not in page
    assert main(["--quick", "--dataset", str(book), "--report"], folder=committed) == 0
    assert (folder / "REPORT.md").read_text() == page
    assert not committed.exists()
    assert not (tmp_path / "outputs" / "evidence-quick-short-txt").exists()


def test_notes_are_on_groups_that_exist() -> None:
    assert NOTES.keys() <= GROUPS.keys()
    assert all(note_on(name) and "  " not in note_on(name) for name in NOTES)
    assert note_on("passkey") == ""


@pytest.mark.parametrize("planned", [*GROUPS.values(), *QUICK.values()], ids=lambda planned: planned.name)
def test_plans_name_what_exists(planned: Group) -> None:
    task = find_task(planned.task)
    assert planned.baseline in planned.variants
    assert planned.seeds >= 5 or planned in QUICK.values()
    task.with_settings(planned.settings)
    for variant in planned.variants:
        find_variant(variant)
    for measured in planned.measures:
        if measured.where[0] == "results":
            assert measured.where[1] in {"train", *task.tests}


@pytest.mark.parametrize("variant", ["focus", "plain", "hybrid", "log-n", "adaptive span", "static span"])
def test_encoders_label_tokens_from_both_sides(variant: str) -> None:
    task = find_task("entity spans")
    model = build(task, task.settings, variant, Sizes(width=32), seed=0).eval()
    batch = task.batch(1, torch.Generator().manual_seed(0), task.settings)
    before = model(input_ids=batch.input_ids).logits
    assert before.shape == (*batch.input_ids.shape, 5)
    changed = batch.input_ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 30
    assert (model(input_ids=changed).logits[:, -20] - before[:, -20]).abs().max() > 0


@pytest.mark.parametrize("variant", ["focus", "plain", "log-n"])
def test_without_order_items_may_be_shuffled(variant: str) -> None:
    """And all of them are seen, wherever they stand."""
    task = find_task("max-retrieval")
    settings = task.with_settings({"items": 6, "vary": False})
    model = build(task, settings, variant, Sizes(width=32), seed=0).eval()
    batch = task.batch(2, torch.Generator().manual_seed(0), settings)
    order = torch.tensor([5, 3, 1, 0, 2, 4, 6])
    shuffled = replace(batch, input_ids=batch.input_ids[:, order])
    one, other = (forward(model, examples, task)[:, -1] for examples in (batch, shuffled))
    torch.testing.assert_close(one, other)
    changed = replace(batch, input_ids=torch.cat([batch.input_ids[:, :1] * 0 + 11, batch.input_ids[:, 1:]], dim=1))
    assert (forward(model, changed, task)[:, -1] - one).abs().max() > 1e-5


def test_rows_of_text_have_bits_per_byte_and_rows_of_spans_f1() -> None:
    short = {"sizes": {"width": 16}, "steps": 2, "batch": 2, "examples": 8}
    record = run_row(Row("text", "plain", {"length": 16, "megabytes": 0.1}, **short))
    assert record["results"]["held out"]["bits_per_byte"] == pytest.approx(
        record["results"]["held out"]["loss"] / math.log(2)
    )
    record = run_row(Row("entity spans", "plain", {"length": 48}, **short))
    assert 0 <= record["results"]["train"]["f1"] <= 1
    assert record["results"]["train"]["spans_right"] > 0


def test_pretrained_models_are_patched_or_go_on_plain() -> None:
    patched, plain, other = (
        run_row(replace(TINY, variant=variant, pretrain=pretrain))
        for variant, pretrain in (("focus", 3), ("plain", 3), ("plain", 0))
    )
    assert patched["parameters"] > plain["parameters"]
    assert plain["loss"] != other["loss"]
    with pytest.raises(FocusConfigError, match="patched"):
        run_row(replace(TINY, variant="log-n", pretrain=1))


def test_rows_tell_how_attention_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "needle", replace(TASKS["needle"], tests={"2 L": {"length": 64}}))
    short = {"sizes": {"width": 16}, "steps": 2, "batch": 2, "examples": 2}
    for variant, told in (("focus", True), ("log-n", False)):
        record = run_row(Row("needle", variant, {"length": 32}, **short))
        assert ("spread" in record["results"]["2 L"]) == told
    spread = run_row(Row("needle", "plain", {"length": 32}, **short))["results"]["train"]["spread"]
    assert 0 < spread["entropy_share"] <= 1


def test_equal_flops_are_fewer_steps_of_a_dearer_model() -> None:
    costly = group(equal_flops=True, steps=100)
    assert costly.steps_of("plain") == 100
    assert 20 < costly.steps_of("focus") < 90
    assert group(steps=100).steps_of("focus") == 100
