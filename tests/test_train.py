"""The functions of train.py, one by one, on models of a few thousand parameters."""

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from loaders import Batch, StreamingLoader
from loaders.training import (
    CheckpointError,
    expand_images,
    load_checkpoint,
    newest_checkpoint,
    require_writable,
    save_checkpoint,
)
from shardify.convert import PackOptions, pack_dataset
from shardify.errors import UsageError


def _import_script():
    spec = importlib.util.spec_from_file_location("train", Path(__file__).parents[1] / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    return module


train = _import_script()
IMAGE, PICTURES = 259, 16  # the tiny model's image token, and how many of them an image has


def make_batch(rows, image_samples=(), side=56):
    """Rows of tokens; everything from 7 on is trained on."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    count = len(rows)
    return Batch(
        keys=[str(row) for row in range(count)],
        positions=torch.arange(count),
        valid=torch.ones(count, dtype=torch.bool),
        rows=torch.arange(count),
        input_ids=ids,
        labels=torch.where(ids >= 7, ids, -100),
        attention_mask=torch.tensor([[column < len(row) for column in range(length)] for row in rows]),
        images=torch.arange(len(image_samples), dtype=torch.uint8)[:, None, None, None].expand(
            -1, 3, side, side
        ),
        image_samples=torch.tensor(image_samples, dtype=torch.int64),
        state={},
    )


def expand(batch, *, tokens_per_image=3, max_length=100):
    return expand_images(batch, image_token=IMAGE, tokens_per_image=tokens_per_image, max_length=max_length)


class TestExpand:
    def test_each_image_gets_its_tokens_and_rows_are_padded_again(self):
        inputs = expand(make_batch([[1, -200, 7, 8], [1, 7, 8, 9, 10]], [0]))
        assert inputs.input_ids.tolist() == [[1, IMAGE, IMAGE, IMAGE, 7, 8], [1, 7, 8, 9, 10, 0]]
        assert inputs.labels.tolist() == [[-100] * 4 + [7, 8], [-100, 7, 8, 9, 10, -100]]
        assert inputs.attention_mask.tolist() == [[True] * 6, [True] * 5 + [False]]
        assert inputs.images.flatten(1)[:, 0].tolist() == [0]
        assert train.supervised(inputs) == 6
        assert inputs.position_ids is None

    def test_padding_that_no_row_needs_any_more_is_dropped(self):
        inputs = expand(make_batch([[1, -200], [1, 7, 8, 9]], [0]))
        assert inputs.input_ids.shape == (2, 4)

    def test_images_that_no_token_asks_for_are_left_out(self):
        inputs = expand(make_batch([[1, -200, 7], [1, 7], [1, -200, 7, -200]], [0, 0, 1, 2, 2, 2]))
        assert inputs.images.flatten(1)[:, 0].tolist() == [0, 3, 4]
        assert inputs.image_samples.tolist() == [0, 2, 2]

    @pytest.mark.parametrize(
        ("max_length", "tokens", "images"),
        [
            (9, [1, IMAGE, IMAGE, IMAGE, 7, IMAGE, IMAGE, IMAGE, 8], 2),
            (8, [1, IMAGE, IMAGE, IMAGE, 7, IMAGE, IMAGE, IMAGE], 2),
            (7, [1, IMAGE, IMAGE, IMAGE, 7], 1),
            (5, [1, IMAGE, IMAGE, IMAGE, 7], 1),
            (3, [1], 0),
        ],
    )
    def test_a_long_row_is_cut_but_never_within_an_image(self, max_length, tokens, images):
        inputs = expand(make_batch([[1, -200, 7, -200, 8]], [0, 0]), max_length=max_length)
        assert inputs.input_ids.tolist() == [tokens]
        assert inputs.images.flatten(1)[:, 0].tolist() == list(range(images))

    def test_an_image_token_that_a_text_writes_is_no_image(self):
        inputs = expand(make_batch([[1, IMAGE, 8]]))
        assert inputs.input_ids.tolist() == [[1, 0, 8]]
        assert inputs.labels.tolist() == [[-100, -100, 8]]
        assert inputs.attention_mask.all()

    def test_image_tokens_in_labels_are_not_trained_on(self):
        batch = make_batch([[1, -200, 7]], [0])
        batch.labels[0, 1] = -200
        assert expand(batch).labels.tolist() == [[-100] * 4 + [7]]


def make_packed(rows, image_samples=()):
    """Rows of samples of tokens."""
    batch = make_batch([list(itertools.chain(*row)) for row in rows], image_samples)
    samples = [(row, sample) for row, packed in enumerate(rows) for sample in packed]
    segments = torch.zeros_like(batch.input_ids)
    for row, packed in enumerate(rows):
        numbers = [number for number, sample in enumerate(packed, 1) for _ in sample]
        segments[row, : len(numbers)] = torch.tensor(numbers)
    return replace(
        batch,
        keys=[str(number) for number in range(len(samples))],
        positions=torch.arange(len(samples)),
        valid=torch.ones(len(samples), dtype=torch.bool),
        rows=torch.tensor([row for row, _ in samples]),
        segment_ids=segments,
        position_ids=segments,  # made anew
    )


class TestPacked:
    def test_positions_begin_anew_and_no_sample_foretells_the_next(self):
        inputs = expand(make_packed([[[1, -200, 7], [8, 9]], [[1, 7]]], [0]))
        assert inputs.input_ids.tolist() == [[1, IMAGE, IMAGE, IMAGE, 7, 8, 9], [1, 7, 0, 0, 0, 0, 0]]
        assert inputs.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 1]
        assert inputs.position_ids[1, :3].tolist() == [0, 1, 0]
        assert inputs.segment_ids[0].tolist() == [1] * 5 + [2] * 2
        assert inputs.labels[0].tolist() == [-100] * 4 + [7, -100, 9]

    def test_each_sample_is_cut_and_has_its_own_images(self):
        rows = [[[1, -200, 7, -200, 8], [1, 7], [1, -200, 9]], [[1, -200, 7]]]
        inputs = expand(make_packed(rows, [0, 0, 2, 2, 3]), max_length=5)
        assert inputs.input_ids[0].tolist() == [1, IMAGE, IMAGE, IMAGE, 7, 1, 7, 1, IMAGE, IMAGE, IMAGE, 9]
        assert inputs.images.flatten(1)[:, 0].tolist() == [0, 2, 4]

    def test_a_filler_between_samples_has_no_tokens(self):
        batch = make_packed([[[1, -200, 7], [], [1, -200, 9]]], [0, 2])
        batch.valid[1] = False
        batch.segment_ids[batch.segment_ids == 3] = 2
        assert len(expand(batch).images) == 2

    @pytest.mark.parametrize("count", [1, 2])
    def test_loss_and_gradients_are_those_of_padded_samples(self, stage, count):
        samples = [[1, -200, 7, 8, 9], [1, 10, 11, 12], [1, -200, 30, 31], [1, 40], [1, -200, -200, 50]]
        first, second = tiny(stage), tiny(stage)
        padded = summed(first, make_batch(samples, [0, 2, 4, 4]), stage)
        packed = summed(second, make_packed([samples[:3], samples[3:]], [0, 2, 4, 4]), stage, count)
        assert packed[1] == padded[1]
        assert packed[0] == pytest.approx(padded[0], rel=1e-5)
        torch.testing.assert_close(gradients(second), gradients(first), rtol=1e-4, atol=1e-5)


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


IDENTITY = {"model": "tiny", "stage": "finetune"}


class Frozen(torch.nn.Module):
    """A part that is trained, and one that is not."""

    def __init__(self, value):
        super().__init__()
        self.trained = torch.nn.Linear(2, 1)
        self.frozen = torch.nn.Linear(2, 1).requires_grad_(False)
        for parameter in self.parameters():
            torch.nn.init.constant_(parameter, value)


class TestCheckpoints:
    def save(self, folder, step, value=1.0):
        model = Frozen(value)
        optimizer = torch.optim.AdamW(model.trained.parameters(), lr=value)
        model.trained(torch.ones(2)).backward()
        optimizer.step()
        save_checkpoint(folder, model, optimizer, IDENTITY | {"step": step, "loader": {"epoch": 0}})
        return model, optimizer

    def test_the_newest_is_loaded_and_two_are_kept(self, tmp_path):
        folder = tmp_path / "new" / "folder"
        require_writable(folder, "--checkpoint-dir")
        assert newest_checkpoint(folder, IDENTITY) is None
        for step in (9, 10, 100):
            saved, moments = self.save(folder, step, value=step)
        assert sorted(path.name for path in folder.iterdir()) == ["step-000000010", "step-000000100"]
        path, facts = newest_checkpoint(folder, IDENTITY)
        assert (facts["step"], facts["loader"]) == (100, {"epoch": 0})
        model = Frozen(5.0)
        optimizer = torch.optim.AdamW(model.trained.parameters(), lr=1.0)
        load_checkpoint(path, model, optimizer)
        assert torch.equal(model.trained.weight, saved.trained.weight)
        assert model.frozen.weight.unique().tolist() == [5.0]  # not of the checkpoint
        before, after = (each.state_dict()["state"] for each in (moments, optimizer))
        torch.testing.assert_close(after, before, rtol=0, atol=0)

    def test_what_a_kill_left_half_written_is_not_taken(self, tmp_path):
        self.save(tmp_path, 1)
        (tmp_path / "unfinished").mkdir()
        assert newest_checkpoint(tmp_path, IDENTITY)[1]["step"] == 1

    def test_another_stage_is_refused(self, tmp_path):
        self.save(tmp_path, 1)
        with pytest.raises(CheckpointError, match=r"--stage finetune, not pretrain"):
            newest_checkpoint(tmp_path, IDENTITY | {"stage": "pretrain"})

    def test_damaged_weights_are_told(self, tmp_path):
        model, optimizer = self.save(tmp_path, 1)
        (shares,) = (tmp_path / "step-000000001").glob("*.distcp")
        shares.write_bytes(shares.read_bytes()[:100])
        with pytest.raises(CheckpointError, match=r"step-000000001 cannot be read.*delete it"):
            load_checkpoint(tmp_path / "step-000000001", model, optimizer)

    @pytest.mark.parametrize("content", ["", "{", "[1]", '{"step": 1}', None])
    def test_other_content_is_told(self, tmp_path, content):
        (tmp_path / "step-000000001").mkdir()
        if content is not None:
            (tmp_path / "step-000000001/state.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"step-000000001 (cannot be read|is no checkpoint)"):
            newest_checkpoint(tmp_path, IDENTITY)

    def test_a_folder_that_cannot_be_written_to_is_refused_at_once(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match=r"--checkpoint-dir .*file/x: cannot be written to"):
            require_writable(tmp_path / "file" / "x", "--checkpoint-dir")

    def test_a_checkpoint_that_cannot_be_written_is_one_message(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="cannot be written"):
            self.save(tmp_path / "file", 1)


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "x"])
def test_impossible_learning_rates_are_refused(rate, capsys):
    with pytest.raises(SystemExit) as caught:
        train.parse_arguments(["--shards", "x", "--lr", rate])
    assert caught.value.code == 2
    assert "--lr" in capsys.readouterr().err


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

    def test_they_are_exported_with_what_prepares_their_input(self, folder, tmp_path, monkeypatch):
        config = train.model_config(folder)
        llava = train.build_model(folder, config, train.STAGES["finetune"], seed=0)
        monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
        train.export(tmp_path, folder, llava)
        text, image = train.preprocessing(
            str(tmp_path), train.model_config(str(tmp_path)), train.STAGES["finetune"], 77
        )
        assert (text.pad_token_id, image.mean) == (3, (0.5, 0.4, 0.3))
        again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
        torch.testing.assert_close(again.state_dict(), llava.state_dict(), rtol=0, atol=0)

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
