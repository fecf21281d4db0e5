"""Published tables measured again: on tiny models and data of the published form, against transformers' own ways."""

import json
import shutil

import numpy as np
import published_parts as parts
import pytest
import torch
import transformers

from cfmerge.errors import CfmergeError
from cfmerge_accuracy.published import checks, clip, glue, gpt2, pictures, places, run
from cfmerge_accuracy.published.numbers import PUBLISHED
from cfmerge_accuracy.published.suites import CLIP, GPT2, SUITES

transformers.utils.logging.disable_progress_bar()
LONG = " ".join(parts.WORDS * 12)  # more than 512 bytes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with all models and data of both tables."""
    root = tmp_path_factory.mktemp("published")
    parts.gpt2_models(root)
    parts.glue_sets(root)
    parts.clip_models(root)
    parts.image_sets(root, names=("eurosat", "mnist"))
    return root


def asked(root, output, **more):
    """Options of a run of two tasks, without a merge."""
    return run.Options(root, output, **{"suites": ["gpt2"], "tasks": ["rte", "mnli"], "lines": ["experts"], **more})


def found_of(suite, root, *tasks):
    """The parts of a table, checked."""
    found = checks.find(suite, root)
    assert not checks.check(found, [suite.task(name) for name in tasks], suite.lines[:2])
    return found


# --- numbers ---


@pytest.mark.parametrize("suite", SUITES)
def test_the_published_averages_are_those_of_the_tasks(suite):
    for line, several in PUBLISHED[suite].items():
        for one in several:
            if one.by_task:
                assert np.mean(list(one.by_task.values())) == pytest.approx(one.average, abs=0.1), (line, one.source)


def test_task_arithmetic_was_published_on_the_matched_set():
    """0.685583 is a number of right answers among the examples of the matched set, and of no other one."""
    off = {name: abs(0.685583 * one.size - round(0.685583 * one.size)) for name, one in glue.SETS.items()}
    assert off["mnli-matched"] < 0.005
    assert off["mnli"] > 0.3


# --- GPT-2 ---


def uneven(root):
    """MNLI's texts, and two that are cut at 512 tokens."""
    return [*glue.read(glue.files_of(root / "glue", "mnli"), "mnli").texts, (LONG, "no"), ("no", LONG)]


def predicted(root):
    """The labels of these texts by the expert, in batches of several lengths."""
    made, expert = gpt2.tokenizer_of(root / "gpt2"), root / GPT2.task("mnli").expert
    model = gpt2.classifier(gpt2.trunk_of(expert), expert, made.pad_token_id)
    return gpt2.predict(model, made, uneven(root), 4, "cpu")


def test_experts_predict_as_transformers_loads_them(root):
    """By the class's own way to load, one text at a time, without padding, cut at 512 tokens."""
    made = gpt2.tokenizer_of(root / "gpt2")
    model = transformers.GPT2ForSequenceClassification.from_pretrained(root / GPT2.task("mnli").expert)
    with torch.inference_mode():
        one_by_one = [
            int(model(**made(*text, truncation=True, max_length=512, return_tensors="pt")).logits.argmax())
            for text in uneven(root)
        ]
    assert max(len(made(*text)["input_ids"]) for text in uneven(root)) > gpt2.LENGTH
    assert len(set(one_by_one)) > 1
    assert predicted(root) == one_by_one


@pytest.mark.long
def test_experts_predict_as_in_a_pipeline_of_transformers(root):
    pipe = transformers.pipeline(
        "text-classification", str(root / GPT2.task("mnli").expert), tokenizer=gpt2.tokenizer_of(root / "gpt2")
    )
    pairs = [dict(zip(("text", "text_pair"), text, strict=True)) for text in uneven(root)]
    theirs = [pipe(pair, truncation=True, max_length=512)["label"] for pair in pairs]
    assert [f"LABEL_{number}" for number in predicted(root)] == theirs


def test_a_batch_padded_to_512_has_the_same_logits(root):
    """As the published code pads; texts are padded on the right, and the last token is read."""
    made, expert = gpt2.tokenizer_of(root / "gpt2"), root / GPT2.task("rte").expert
    model = gpt2.classifier(gpt2.trunk_of(expert), expert, made.pad_token_id)
    texts = glue.read(glue.files_of(root / "glue", "rte"), "rte").texts
    first, second = map(list, zip(*texts, strict=True))
    with torch.inference_mode():
        full, short = (
            model(**made(first, second, padding=how, truncation=True, return_tensors="pt")).logits
            for how in ("max_length", True)
        )
    assert (made.pad_token_id, made.padding_side) == (256, "right")
    torch.testing.assert_close(full, short, atol=1e-5, rtol=1e-4)


def test_mnli_is_the_mismatched_set_unless_it_is_asked_for(root, tmp_path):
    assert glue.files_of(root / "glue", "mnli")[0].name == "validation_mismatched-00000-of-00001.parquet"
    assert glue.files_of(root / "glue", "mnli-matched")[0].name == "validation_matched-00000-of-00001.parquet"
    (text,) = run.run(asked(root, tmp_path, only_check=True, tasks=["mnli-matched"]), lambda line: None)
    assert "| MNLI matched |" in text
    assert "mnli-matched" not in [task.name for task in GPT2.counted]


def write_tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def test_files_of_glue_hold_the_same_examples(root, tmp_path):
    """CoLA's has no line of names; quotes are letters; labels are names or numbers."""
    for task in ("cola", "mnli", "mrpc"):
        examples = glue.read(glue.files_of(root / "glue", task), task)
        if task == "cola":
            rows = [("src", label, "", *text) for text, label in zip(*examples, strict=True)]
        elif task == "mnli":
            names = [glue.SETS[task].labels[label] for label in examples.labels]
            rows = [("index", "sentence1", "sentence2", "label1", "gold_label")]
            rows += [(0, *text, "neutral", name) for text, name in zip(examples.texts, names, strict=True)]
        else:
            rows = [("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String")]
            rows += [(label, 1, 2, *text) for text, label in zip(*examples, strict=True)]
        write_tsv(tmp_path / glue.SETS[task].file, rows)
        assert glue.read(glue.files_of(tmp_path, task), task) == examples
    write_tsv(tmp_path / "CoLA/dev.tsv", [("src", 1, "", 'a "quoted')])
    assert glue.read([tmp_path / "CoLA/dev.tsv"], "cola").texts == [('a "quoted',)]


WRONG = {
    "columns": ({"text": ["a"], "label": [0]}, glue.ENTAILED, "no column sentence1, sentence2; there is: text, label"),
    "order": (
        {"sentence1": ["a"], "sentence2": ["b"], "label": [0]},
        glue.ENTAILED[::-1],
        "its labels are not_entailment, entailment; expected entailment, not_entailment",
    ),
    "test set": ({"sentence1": ["a"], "sentence2": ["b"], "label": [-1]}, glue.ENTAILED, "take the validation set"),
}


@pytest.mark.parametrize("case", WRONG)
def test_data_of_another_form_are_refused(case, tmp_path):
    columns, names, message = WRONG[case]
    path = tmp_path / "rte" / "validation-00000-of-00001.parquet"
    parts.write_parquet(path, columns, names)
    with pytest.raises(CfmergeError, match=message):
        glue.read([path], "rte")


def test_outputs_of_a_head_are_in_the_order_of_its_config(tmp_path):
    def order(*names):
        return gpt2.order_of({"id2label": {str(n): name for n, name in enumerate(names)}}, "rte", tmp_path)

    assert order("LABEL_0", "LABEL_1") == order("entailment", "not_entailment") == [0, 1]
    assert order("NOT_ENTAILMENT", "entailment") == [1, 0]
    assert gpt2.order_of({}, "mnli", tmp_path) == [0, 1, 2]
    with pytest.raises(CfmergeError, match="id2label is yes, no; the labels of rte are entailment, not_entailment"):
        order("yes", "no")
    with pytest.raises(CfmergeError, match="id2label has 3 labels, and rte has 2"):
        order("LABEL_0", "LABEL_1", "LABEL_2")


def test_answers_are_counted_in_the_order_of_the_head(root, monkeypatch):
    monkeypatch.setattr(gpt2, "predict", lambda *how: [0, 1, 1])
    examples = glue.Examples([("a",)] * 3, [1, 0, 1])
    assert gpt2.count(None, None, examples, [0, 1]).correct == 1
    assert gpt2.count(None, None, examples, [1, 0]).correct == 2


# --- a run ---


def test_numbers_are_kept_and_not_measured_again(root, tmp_path, monkeypatch):
    told = []
    (text,) = run.run(asked(root, tmp_path), told.append)
    rows = run.kept(tmp_path / run.ROWS)
    assert [(row["task"], row["examples"]) for row in rows] == [("mnli", 9), ("rte", 9)]
    assert f"| experts | here | not run | not run | {100 * rows[0]['accuracy']:.1f} | not run |" in text
    assert (tmp_path / "README.md").read_text().endswith(text)
    assert "mnli has 9 examples here, and 9832 in GLUE" in text
    monkeypatch.setattr(run, "evaluator_of", lambda *how: pytest.fail("measured again"))
    with (tmp_path / run.ROWS).open("a") as file:
        file.write('{"suite": "gp')  # a run that was stopped
    assert run.run(asked(root, tmp_path), told.append) == [text]


def test_another_checkpoint_is_measured_again(root, tmp_path, monkeypatch):
    other = tmp_path / "in"
    shutil.copytree(root, other)
    counted = []
    monkeypatch.setattr(
        run.Texts, "count", lambda self, model, task: counted.append(task.name) or gpt2.Counted(1, 2, 1.0)
    )
    run.run(asked(other, tmp_path / "out"), lambda line: None)
    counted.clear()
    shutil.copy(root / "tanganke/gpt2_cola/model.safetensors", other / "tanganke/gpt2_rte")
    (text,) = run.run(asked(other, tmp_path / "out", tasks=["mnli"]), lambda line: None)
    assert not counted
    assert "| experts | here | not run | not run | 50.0 | not run | not run | not run | not run | not run |" in text
    run.run(asked(other, tmp_path / "out"), lambda line: None)
    assert counted == ["rte"]


def test_a_limit_is_told_and_takes_examples_from_all_over(root, tmp_path):
    (text,) = run.run(asked(root, tmp_path, limit=4, tasks=["rte"]), lambda line: None)
    assert "At most 4 examples of each task" in text
    assert run.kept(tmp_path / run.ROWS)[0]["examples"] == 4
    assert glue.spread(9, 4) == [0, 2, 4, 6]


@pytest.mark.long
def test_a_merge_is_measured_and_removed(root, tmp_path):
    run.run(asked(root, tmp_path, lines=["average"], tasks=["rte"]), lambda line: None)
    (row,) = run.kept(tmp_path / run.ROWS)
    assert (row["line"], row["examples"]) == ("average", 9)
    assert not any((tmp_path / "models").iterdir())


def test_of_what_is_not_there_the_table_says_why(root, tmp_path):
    some = tmp_path / "in"
    some.mkdir()
    for name in ("gpt2", "tanganke/gpt2_rte"):
        (some / name).parent.mkdir(exist_ok=True)
        (some / name).symlink_to(root / name)
    parts.glue_sets(some, names=("rte",))
    tasks, lines = ["rte", "cola"], ["experts", "average", "ace_published"]
    (text,) = run.run(asked(some, tmp_path / "out", tasks=tasks, lines=lines), lambda line: None)
    assert len(run.kept(tmp_path / "out" / run.ROWS)) == 1  # rte's expert alone
    assert f"tanganke/gpt2_cola is not there: hf download tanganke/gpt2_cola --local-dir {some}/gpt2_cola" in text
    assert "hf download nyu-mll/glue --repo-type dataset --include 'cola/validation-*.parquet'" in text
    assert "| ACE as published | here | not run |" in text


def test_all_that_is_wrong_is_told_before_anything_is_measured(root, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "evaluator_of", lambda *how: pytest.fail("measured"))
    other = tmp_path / "in"
    shutil.copytree(root, other)
    config = other / "tanganke/gpt2_rte/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 5}))
    shutil.copy(other / "tanganke/gpt2_mnli/model.safetensors", other / "tanganke/gpt2_cola")
    (other / "glue/rte/validation-00000-of-00001.parquet").write_bytes(b"nothing")
    with pytest.raises(CfmergeError, match="nothing was evaluated") as error:
        run.run(asked(other, tmp_path / "out"), lambda line: None)
    for words in (
        "gpt2_cola: score.weight has 3 outputs, and cola has 2 labels",
        "gpt2_rte: its config's pad_token_id is 5, and the base's tokenizer pads by 256",
        "validation-00000-of-00001.parquet: cannot be read as parquet",
    ):
        assert words in str(error.value)
    with pytest.raises(CfmergeError, match="--task 'rtx': there is no such name; did you mean 'rte'"):
        run.run(asked(other, tmp_path / "out", tasks=["rtx"]), lambda line: None)
    with pytest.raises(CfmergeError, match="--limit 0: must be at least 1"):
        run.run(asked(other, tmp_path / "out", limit=0), lambda line: None)
    with pytest.raises(CfmergeError, match="none: there is no such directory"):
        run.run(asked(other / "none", tmp_path / "out"), lambda line: None)


def test_the_hubs_cache_is_found(root, tmp_path):
    commit = tmp_path / "hub/models--tanganke--gpt2_rte/snapshots/abc"
    commit.parent.mkdir(parents=True)
    commit.symlink_to(root / "tanganke/gpt2_rte")
    data = tmp_path / "datasets--nyu-mll--glue"
    (data / "snapshots").mkdir(parents=True)
    (data / "refs").mkdir()
    (data / "refs/main").write_text("two")
    for name in ("one", "two"):
        (data / "snapshots" / name).symlink_to(root / "glue")
    assert places.find(tmp_path, ["tanganke/gpt2_rte"]) == commit
    assert places.find(tmp_path, ["nyu-mll/glue"], "dataset") == data / "snapshots/two"
    (data / "refs/main").unlink()
    with pytest.raises(CfmergeError, match="2 snapshots, none named by refs/main"):
        places.find(tmp_path, ["nyu-mll/glue"], "dataset")


# --- CLIP ---


FOUR = pictures.Classes(["a photo of a {}."], ["cat", "dog", "car", "tree"])


def test_logits_are_those_of_the_whole_model(root):
    """By the base, and one template."""
    base = root / CLIP.base[0]
    model, generator = clip.Clip(base), np.random.default_rng(0)
    images = [parts.image(generator) for _ in range(3)]
    texts = model.tokenizer([f"a photo of a {name}." for name in FOUR.classes], padding=True, return_tensors="pt")
    pixels = model.processor(images=images, return_tensors="pt")
    with torch.inference_mode():
        theirs = transformers.CLIPModel.from_pretrained(base)(**texts, **pixels).logits_per_image
    torch.testing.assert_close(model.logits("four", FOUR, images), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_images_are_classified_as_in_a_pipeline_of_transformers(root):
    base = root / CLIP.base[0]
    model, generator = clip.Clip(base), np.random.default_rng(0)
    images = [parts.image(generator) for _ in range(3)]
    pipe = transformers.pipeline(
        "zero-shot-image-classification", transformers.CLIPModel.from_pretrained(base), tokenizer=model.tokenizer,
        image_processor=model.processor,
    )  # fmt: skip
    scores = model.logits("four", FOUR, images).softmax(-1)
    for image, own in zip(images, scores, strict=True):
        found = {one["label"]: one["score"] for one in pipe(image, FOUR.classes, hypothesis_template=FOUR.templates[0])}
        np.testing.assert_allclose(own, [found[name] for name in FOUR.classes], rtol=1e-4)


def test_a_head_is_the_mean_of_its_templates(root):
    """Unit vectors, one by one, without padding."""
    model = clip.Clip(root / CLIP.base[0])
    classes = pictures.classes_of("eurosat")
    rows = []
    for name in classes.classes[:2]:
        one_by_one = []
        for template in classes.templates:
            inputs = model.tokenizer(template.replace("{}", name), truncation=True, max_length=77, return_tensors="pt")
            vector = model.model.text_projection(model.model.text_model(**inputs).pooler_output)[0]
            one_by_one.append(vector / vector.norm())
        mean = torch.stack(one_by_one).mean(0)
        rows.append(mean / mean.norm())
    torch.testing.assert_close(model.head("eurosat", classes)[:2], torch.stack(rows), atol=1e-5, rtol=1e-4)


def test_experts_encode_as_transformers_loads_them(root):
    """And an encoder without the projection behind it leaves none of an earlier one's."""
    model = clip.Clip(root / CLIP.base[0])
    expert = root / CLIP.task("mnist").expert
    encoder = clip.encoder_of(expert)
    model.encode_by({**encoder, "visual_projection.weight": np.zeros((8, 8), np.float32)})
    model.encode_by(encoder)
    assert model.model.visual_projection.weight.abs().sum() > 0
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = transformers.CLIPVisionModel.from_pretrained(expert)(pixel_values=pixels).pooler_output
    torch.testing.assert_close(
        model.model.vision_model(pixel_values=pixels).pooler_output, theirs, atol=1e-5, rtol=1e-4
    )
    encoder.popitem()
    with pytest.raises(CfmergeError, match="the image encoder does not fit the base's; missing: vision_model"):
        model.encode_by(encoder)


def test_an_encoder_is_named_as_in_the_whole_model(root, tmp_path):
    """transformers 5 saves it without a prefix."""
    expert = root / CLIP.task("mnist").expert
    transformers.CLIPVisionModel.from_pretrained(expert).save_pretrained(tmp_path)
    bare, stored = clip.encoder_of(tmp_path), clip.encoder_of(expert)
    assert bare.keys() == stored.keys()
    np.testing.assert_array_equal(
        bare["vision_model.embeddings.class_embedding"], stored["vision_model.embeddings.class_embedding"]
    )


def test_images_come_with_their_labels_from_parquet_and_from_folders(root, tmp_path):
    found = found_of(CLIP, root, "eurosat", "mnist")
    for task, labels in (("eurosat", [0, 5, 8]), ("mnist", [0, 5, 8])):
        data = found.data[task]
        assert len(data.labels) == 12
        chosen = [0, 6, 10]
        assert [data.labels[number] for number in chosen] == labels
        generator = np.random.default_rng(10)
        drawn = [np.asarray(parts.image(generator)) for _ in range(12)]
        if task == "eurosat":
            for number, (label, image) in zip(chosen, data.images(chosen), strict=True):
                assert label == data.labels[number]
                np.testing.assert_array_equal(np.asarray(image), drawn[number])
    shutil.copytree(root / "ylecun/mnist/test/0", tmp_path / "test/zero")
    with pytest.raises(CfmergeError, match=r"folder 'zero' is no class of the published task.*'0', '1'"):
        pictures.read(pictures.files_of(tmp_path, "mnist"), "mnist")


def test_right_images_are_counted(root):
    """Labels made by the expert itself are all right; others are not."""
    found = found_of(CLIP, root, "eurosat")
    data = found.data["eurosat"]
    model = clip.Clip(found.base)
    classes = pictures.classes_of("eurosat")
    model.encode_by(clip.encoder_of(found.experts["eurosat"]))
    images = [image for _, image in data.images(range(12))]
    own = [int(number) for number in model.logits("eurosat", classes, images).argmax(-1)]
    assert model.count("eurosat", classes, data._replace(labels=own), range(12), batch=5).accuracy == 1
    others = [(label + (number < 3)) % 10 for number, label in enumerate(own)]
    assert model.count("eurosat", classes, data._replace(labels=others), range(12), batch=5).correct == 9


@pytest.mark.parametrize(("task", "count"), [("sun397", 397), ("stanford-cars", 196), ("resisc45", 45), ("dtd", 47)])
def test_each_task_has_its_classes(task, count):
    found = pictures.classes_of(task)
    assert len(set(found.classes)) == count
    assert all("{}" in template for template in found.templates)


@pytest.mark.long
def test_both_tables_whole(root, tmp_path, monkeypatch):
    """All lines and tasks, by the command line."""
    import typer.testing

    from cfmerge.cli import app

    parts.image_sets(root)
    done = typer.testing.CliRunner().invoke(
        app, ["bench", "published", "--checkpoints", str(root), "-o", str(tmp_path), "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    rows = run.kept(tmp_path / run.ROWS)
    lines = {suite.name: [line for line in suite.lines if checks.there(line)] for suite in SUITES.values()}
    assert len(rows) == 7 * len(lines["gpt2"]) + 8 * len(lines["clip"])
