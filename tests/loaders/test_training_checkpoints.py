"""Checkpoints: whole, or not there; of two parts, one of which is frozen."""

import resource

import pytest
import torch

from loaders.training import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    require_writable,
    save_checkpoint,
)
from shardify.errors import UsageError

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

    def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(self, tmp_path):
        self.save(tmp_path, 1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may be larger
        try:
            with pytest.raises(
                CheckpointError, match=r"step-000000002 cannot be written .* MB are free"
            ) as told:
                self.save(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(told.value)
        assert newest_checkpoint(tmp_path, IDENTITY)[1]["step"] == 1
        self.save(tmp_path, 2)
        assert newest_checkpoint(tmp_path, IDENTITY)[1]["step"] == 2
