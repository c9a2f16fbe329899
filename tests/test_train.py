"""The functions of train.py, one by one, on models of a few thousand parameters."""

import importlib.util
import itertools
import json
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from loaders import StreamingLoader
from loaders.training import ExportError, export_model
from shardify.convert import PackOptions, pack_dataset
from shardify.errors import UsageError
from tests.loaders.rows import expand, make_batch, make_packed


def _import_script():
    spec = importlib.util.spec_from_file_location("train", Path(__file__).parents[1] / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


train = _import_script()
PICTURES = 16  # tokens of an image for the tiny model


@pytest.fixture(scope="module", params=["pretrain", "finetune"])
def stage(request):
    return train.STAGES[request.param]


def prepared(batch, stage):
    """As the model takes it."""
    _, image = train.preprocessing("tiny", train.model_config("tiny"), stage, 100)
    batch = expand(batch, tokens_per_image=PICTURES, max_length=2048)
    return replace(batch, images=image.normalize(batch.images, torch.float32))


def summed(model, batch, stage, count=1):
    """The loss over a batch and the number of its tokens, with gradients added to the model's."""
    batch = prepared(batch, stage)
    losses = [model(*values) for values in train.passes(batch, count)]
    sum(losses).backward()
    return sum(losses).item(), int(train.supervised(batch))


def tiny(stage):
    config = train.model_config("tiny")
    return train.SummedLoss(train.build_model("tiny", config, stage, seed=0))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


class TestModel:
    def test_a_stage_trains_its_parts_alone(self):
        parts = {}
        for name, stage in train.STAGES.items():
            llava = tiny(stage).llava
            parts[name] = {path.split(".")[:2][-1] for path, p in llava.named_parameters() if p.requires_grad}
        assert parts["pretrain"] == {"multi_modal_projector"}
        assert parts["finetune"] == {"multi_modal_projector", "language_model", "weight"}  # lm_head.weight

    def test_it_is_the_same_for_the_same_seed(self, stage):
        first, second = tiny(stage).state_dict(), tiny(stage).state_dict()
        torch.testing.assert_close(first, second, rtol=0, atol=0)

    def test_the_loss_is_the_models_own_times_its_tokens(self, stage):
        model, batch = tiny(stage), make_batch([[1, -200, 7, 8, 9], [1, 7, 8]], [0])
        loss, tokens = summed(model, batch, stage)
        inputs = prepared(batch, stage)
        own = model.llava(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            labels=inputs.labels,
            pixel_values=inputs.images,
        ).loss
        assert loss == pytest.approx(own.item() * tokens, rel=1e-5)

    @pytest.mark.parametrize("rows", [[[0]], [[0], [0]], [[1, 7, 8]]], ids=["filler", "fillers", "text"])
    def test_every_trained_parameter_has_a_gradient_without_images(self, stage, rows):
        model = tiny(stage)
        loss, tokens = summed(model, make_batch(rows), stage)
        assert (loss > 0) == (tokens > 0)
        assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
        projector = [g for name, g in gradients(model).items() if "projector" in name]
        assert len(projector) == 4
        assert not any(gradient.any() for gradient in projector)


@pytest.mark.parametrize("count", [1, 2])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(stage, count):
    samples = [[1, -200, 7, 8, 9], [1, 10, 11, 12], [1, -200, 30, 31], [1, 40], [1, -200, -200, 50]]
    first, second = tiny(stage), tiny(stage)
    padded = summed(first, make_batch(samples, [0, 2, 4, 4]), stage)
    packed = summed(second, make_packed([samples[:3], samples[3:]], [0, 2, 4, 4]), stage, count)
    assert packed[1] == padded[1]
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    torch.testing.assert_close(gradients(second), gradients(first), rtol=1e-4, atol=1e-5)


def test_three_samples_on_eight_ranks_are_the_same_three_samples(stage, tmp_path):
    records = [
        {
            "id": str(number),
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "Noise. " * (number + 1)},
            ],
        }
        for number in range(3)
    ]
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "chat.json").write_text(json.dumps(records))
    pack_dataset(
        PackOptions(records=[tmp_path / "chat.json"], images=[tmp_path], out=tmp_path / "data", workers=1)
    )
    text, image = train.preprocessing("tiny", train.model_config("tiny"), stage, 2048)

    def epoch(world_size):
        model, loss, tokens, steps = tiny(stage), 0.0, 0, set()
        for rank in range(world_size):
            loader = StreamingLoader(
                tmp_path / "data",
                batch_size=4,
                image=image,
                text=text,
                num_workers=0,
                rank=rank,
                world_size=world_size,
            )
            batches = list(loader)
            steps.add(len(batches))
            for batch in batches:
                rank_loss, rank_tokens = summed(model, batch, stage)
                loss, tokens = loss + rank_loss, tokens + rank_tokens
        assert steps == {1}
        return loss / tokens, {name: gradient / tokens for name, gradient in gradients(model).items()}

    alone, alone_gradients = epoch(1)
    with pytest.warns(UserWarning, match="3 samples for 8 ranks"):
        spread, spread_gradients = epoch(8)
    assert spread == pytest.approx(alone, abs=1e-5)
    torch.testing.assert_close(spread_gradients, alone_gradients, rtol=1e-5, atol=1e-5)


def test_learning_rate_warms_up_and_falls_to_nothing():
    rates = [train.learning_rate(2.0, progress) for progress in np.linspace(0, 1, 1001)]
    assert rates[0] == 0
    assert rates[30] == pytest.approx(2.0)
    assert rates[15] == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[30:]))
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert train.learning_rate(2.0, 1.01) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--lr", ["0", "-1", "nan", "inf", "x"]),
        ("--skip", ["5", "5:5", "-1:2", "1:2:3", "a:b", ":"]),
        ("--max-errors", ["-1", "1.5", "nan", "inf", "x"]),
        ("--validation", ["1", "-0.1", "x"]),
        ("--steps", ["0", "1.5", "x"]),
    ],
)
def test_impossible_values_are_refused(option, values, capsys):
    for value in values:
        with pytest.raises(SystemExit) as caught:
            train.parse_arguments(["--shards", "x", f"{option}={value}"])
        assert caught.value.code == 2
        assert f"argument {option}: {value} is not " in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("0.01", 0.01), ("1", 1), ("100", 100)])
def test_bad_samples_are_a_count_or_a_share(text, value):
    found = train.parse_arguments(["--shards", "x", "--max-errors", text]).max_errors
    assert (found, type(found)) == (value, type(value))


def test_what_the_command_line_says_goes_before_the_stage():
    def stage(*options):
        return train.chosen_stage(train.parse_arguments(["--shards", "x", *options]))

    assert stage("--model", "m") == train.STAGES["finetune"]
    assert stage("--stage", "pretrain", "--model", "m") == train.STAGES["pretrain"]
    assert (stage().learning_rate, stage("--lr", "0.5").learning_rate) == (3e-3, 0.5)
    other = stage("--model", "m", "--template", "llama_2", "--group-by", "none")
    assert other == replace(train.STAGES["finetune"], template="llama_2", group_by="none")


def test_more_processes_than_gpus_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UsageError, match="there are 1 here"):
        train.join_ranks()


def test_what_is_held_out_is_evaluated_as_a_model_is_used(monkeypatch):
    class Model(torch.nn.Module):
        def forward(self, input_ids, labels, *_):
            modes.append(self.training)
            return torch.tensor(2.0)

    class Batches(list):
        device = torch.device("cpu")

        def close(self):
            pass

    model, modes = Model(), []
    monkeypatch.setattr(train, "summed_over_ranks", lambda *values: list(values))
    batches = Batches([make_batch([[1, 7, 8], [1, 7]]), make_batch([[1, 7]])])
    assert train.evaluate(model, batches, accumulate=2) == 6.0 / 4  # 3 passes of loss 2, 4 tokens
    assert modes == [False] * 3
    assert model.training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LLaVA model as transformers saves it, with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    words = {
        word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", "hello", "<image>"])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = train.model_config("tiny")
    train.build_model("tiny", config, train.STAGES["finetune"], seed=3).save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


class TestModelsOnDisk:
    def test_they_are_loaded_with_their_preprocessing(self, folder, stage):
        config = train.model_config(folder)
        text, image = train.preprocessing(folder, config, stage, 77)
        assert (image.size, image.fit) == (56, stage.fit)
        assert (image.mean, image.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
        assert (text.pad_token_id, text.max_length, text.template.name) == (3, 77, stage.template)
        loaded = train.build_model(folder, config, stage, seed=0)
        made = train.build_model("tiny", train.model_config("tiny"), stage, seed=3)
        torch.testing.assert_close(loaded.state_dict(), made.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_they_are_exported_in_their_dtype_with_what_prepares_their_input(self, folder, tmp_path, dtype):
        half = shutil.copytree(folder, tmp_path / "half")
        train.build_model(folder, None, train.STAGES["finetune"], seed=0).to(dtype).save_pretrained(half)
        config = train.model_config(str(half))
        llava = train.build_model(str(half), config, train.STAGES["finetune"], seed=0)
        assert llava.dtype == torch.float32
        assert config.dtype == dtype
        export_model(tmp_path / "out", llava, dtype=config.dtype, source=str(half))
        text, image = train.preprocessing(
            str(tmp_path / "out"), train.model_config(str(tmp_path / "out")), train.STAGES["finetune"], 77
        )
        assert (text.pad_token_id, image.mean) == (3, (0.5, 0.4, 0.3))
        again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
        assert again.dtype == dtype
        torch.testing.assert_close(again.state_dict(), llava.to(dtype).state_dict(), rtol=0, atol=0)

    def test_a_folder_that_takes_no_model_is_told(self, folder, tmp_path):
        llava = train.build_model(folder, None, train.STAGES["finetune"], seed=0)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (1000, limits[1])
        )  # no file may be larger, as on a full disk
        try:
            with pytest.raises(ExportError, match=r"out: the model cannot be written"):
                export_model(tmp_path / "out", llava, dtype=torch.float32)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def test_image_tokens_are_counted_without_the_model(self, folder):
        config = train.model_config(folder)
        _, image = train.preprocessing(folder, config, train.STAGES["finetune"], 77)
        assert train.count_image_tokens(config, image) == PICTURES

    def test_other_models_are_refused(self, tmp_path):
        transformers.LlamaConfig().save_pretrained(tmp_path)
        with pytest.raises(UsageError, match="'llama' model; a 'llava' one is needed"):
            train.model_config(str(tmp_path))

    def test_a_folder_without_model_is_named(self, tmp_path):
        with pytest.raises(UsageError, match="cannot load it"):
            train.model_config(str(tmp_path))
