"""Checkpoints: all that a run needs to go on, on any number of ranks, and the weights for use. Reading one runs no code.

    run/step_00000100/model.safetensors                 whole weights in fp32; beyond 5 GB model-00001-of-0000n.safetensors
                                                        and model.safetensors.index.json, as on the Hugging Face hub
    run/step_00000100/optimizer/shard-*.safetensors     AdamW's moments, as the ranks held them
    run/step_00000100/checkpoint.json                   settings, progress, the SHA-256 of every file and of itself
    run/latest                                          the newest one's name, for people and scripts

torch.distributed.checkpoint writes and reads them as safetensors, none of its pickles: a tensor may have been divided
otherwise when it was saved.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from model import ModelConfig, Transformer, shard_like
from training.distributed import SINGLE, all_gather

FILE_BYTES = 5e9  # of weights per file

# said of every save in a single process, which no_dist has asked for
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


# ------------------------------------------------------------------------------------------------------ the record


def file_digest(path):
    """SHA-256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def record_digest(record):
    """SHA-256 of a checkpoint's JSON record, independent of its layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_checkpoint(folder, part=0, parts=1):
    """The JSON record of a checkpoint folder, after checking it and its files by SHA-256; raises ValueError, or OSError where the
    disk or the network fails: then nothing is known of the checkpoint.

    Of `parts` ranks that share the work, number `part` checks every parts-th file.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "checkpoint.json").read_text())
        if record.pop("record_sha256") != record_digest(record):
            raise ValueError(f"{folder / 'checkpoint.json'} is damaged")
        files = record["sha256"]
        if not any(name.startswith("model") for name in files):
            raise ValueError(f"{folder / 'checkpoint.json'} lists no weights")
        for name in sorted(files)[part::parts]:
            if not (folder / name).is_file() or file_digest(folder / name) != files[name]:
                raise ValueError(f"{folder / name} is missing or damaged")
        if strange := [p for p in (*folder.glob("*.safetensors"), *folder.glob("optimizer/*")) if p.relative_to(folder).as_posix() not in files]:
            raise ValueError(f"{strange[0]} is no part of this checkpoint")
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as problem:
        raise ValueError(f"{folder} is no complete checkpoint ({type(problem).__name__}: {problem})") from None
    return record


def checkpoints(run):
    """The checkpoint folders of a run, newest first."""
    return sorted((p for p in Path(run).glob("step_*") if p.name[5:].isdigit()), key=lambda p: -int(p.name[5:]))


def load_newest(run, warn, ranks=SINGLE, fit=lambda record: True):
    """(folder, record) of the newest undamaged checkpoint whose record is `fit`; every damaged one is passed to `warn`.

    All ranks choose the same. Raises FileNotFoundError if there is none, OSError if one can't be read, which need not be damage.
    """
    for folder in all_gather(ranks, checkpoints(run))[0]:
        record = problem = failure = None
        try:
            record = read_checkpoint(folder, ranks.rank, ranks.world)
        except ValueError as damage:
            problem = str(damage)
        except OSError as error:
            failure = f"{folder} can't be read: {error}"
        said = all_gather(ranks, (problem, failure))
        if failure := next((failure for _, failure in said if failure), None):
            raise OSError(failure)
        if problem := next((problem for problem, _ in said if problem), None):
            warn(f"{problem}; falling back to the checkpoint before it")
        elif fit(record):
            return folder, record
    raise FileNotFoundError(f"no usable checkpoint in '{run}'")


# ---------------------------------------------------------------------------------------------------- reading weights


def weight_files(folder):
    """The files that hold a checkpoint's weights."""
    return sorted(Path(folder).glob("model*.safetensors"))


def load_model(folder, record, device="cpu"):
    """Build the network of a checkpoint and read its weights (safetensors: no code runs); raises ValueError."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(**record["model"]))
    try:
        weights = {}
        for file in weight_files(folder):
            weights |= load_file(file)
        model.to_empty(device="cpu").load_state_dict(weights)
    except (SafetensorError, RuntimeError) as problem:
        raise ValueError(f"{folder}: its weights can't be read: {str(problem).splitlines()[0]}") from None
    return model.tables().to(device)


@torch.no_grad()
def init_weights_from(folder, record, network):
    """Give `network` the weights of another checkpoint of its shape, parameter by parameter; raises ValueError.

    Of the embedding the text tokens' rows count: the mask may have another id now. Its row is the old mask's, or, if that has never
    been seen (an AR model's), the mean of the tokens'. What the checkpoint has not (a time embedding) stays as it is.
    """
    old, new = ModelConfig(**record["model"]), network.config
    where = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file)
    for name, p in network.named_parameters():
        if name not in where and not name.startswith("time."):
            raise ValueError(f"{folder} has no {name}")
        if name not in where:
            continue
        with safe_open(where[name], "pt") as tensors:
            values = tensors.get_tensor(name)
        if name in ("embed.weight", "lm_head.weight"):
            text = values[: new.n_vocab].float()
            rows = text.new_zeros(p.shape)
            rows[: new.n_vocab] = text
            rows[new.mask_id] = text.mean(0) if old.causal else values[old.mask_id].float()
            values = rows
        if values.shape != p.shape:
            raise ValueError(f"{folder}: {name} is {tuple(values.shape)}, and should be {tuple(p.shape)}")
        p.copy_(shard_like(values, p))


def restore(folder, record, network, optimizer, ranks=SINGLE):
    """Read weights and optimizer state into `network` and `optimizer`, whatever layout they were saved in; raises ValueError."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception by descent

    weights, moments = parts(network, optimizer, record["updates"])
    try:
        for values, where in ((weights, folder), (moments, folder / "optimizer")):
            dcp.load(values, storage_reader=dcp.HuggingFaceStorageReader(str(where)), process_group=ranks.saving, no_dist=ranks.world == 1)
    except (Exception, CheckpointException) as problem:  # of many types: dcp's own, safetensors', each rank's
        lines = [line for line in str(problem).splitlines() if line.strip()]
        raise ValueError(f"{folder} can't be read: {type(problem).__name__}: {lines[-1] if lines else ''}") from None


def parts(network, optimizer, updates=None):
    """({name: weights}, {name.moment: values}) in place; with `updates` the optimizer's state begins anew, after so many."""
    weights, moments = {}, {}
    for name, p in network.named_parameters():
        state = optimizer.state[p]
        if updates is not None:
            state.update(step=torch.tensor(float(updates), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        weights[name] = p.detach()
        moments |= {f"{name}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return weights, moments


# ------------------------------------------------------------------------------------------------------------ writing


class Saver:
    """Writes checkpoints in a thread while training goes on. Every rank calls the same methods in the same order."""

    def __init__(self, run, network, optimizer, ranks, keep, keep_every=0, kept_steps=(), alive=lambda: None):
        """`alive` is called while something is waited for that makes progress."""
        from torch.distributed.checkpoint.staging import (  # it takes a second to import
            DefaultStager,
            StagingOptions,
        )

        self.run, self.network, self.optimizer, self.ranks = Path(run), network, optimizer, ranks
        self.keep, self.keep_every, self.kept_steps, self.alive, self.files_done = keep, keep_every, kept_steps, alive, 0
        gpu = network.embed.weight.device.type == "cuda"
        self.stager = DefaultStager(StagingOptions(use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu))
        self.thread = self.failure = self.unheard = None  # dict(of=step, why=…) of the last save, if it failed

    def save(self, step, record):
        """Copy the state, then let it be written as run/step_<step>/; waits for the one before, if that is still being written."""
        self.wait()
        weights, moments = parts(self.network, self.optimizer)
        if not any(hasattr(value, "placements") for value in weights.values()):  # all ranks have all: each keeps a copy of its part alone
            rank, world = self.ranks.rank, self.ranks.world
            weights, moments = weights if rank == 0 else {}, dict(list(moments.items())[rank::world])
        updates = int(next(iter(self.optimizer.state.values()))["step"])
        staged = self.stager.stage(dict(weights=weights, moments=moments))
        record = json.loads(json.dumps(dict(record, step=step, updates=updates)))  # what it holds goes on changing
        self.thread = threading.Thread(target=self.work, args=(step, staged, record), daemon=True)
        self.thread.start()

    def wait(self):
        """Until nothing is being written."""
        before = None
        while self.thread and self.thread.is_alive():
            self.thread.join(timeout=1)
            if (now := self.progress()) != before:
                before = now
                self.alive()
        self.thread = None

    def progress(self):
        """Changes while the thread gets on."""
        sizes = 0
        for path in self.run.glob(".step_*/**/*"):
            with contextlib.suppress(OSError):
                sizes += path.stat().st_size
        return self.files_done, sizes

    def news(self):
        """A failure that was not heard of yet, or None."""
        failure, self.unheard = self.unheard, None
        return failure

    def work(self, step, staged, record):
        try:
            self.write(step, staged, record)
            self.failure = None
        except BaseException as problem:  # a full disk, here or on another rank, must not end a long run
            lines = [line for line in str(problem).splitlines() if "Error" in line] or [str(problem)]
            self.failure = self.unheard = dict(of=step, why=lines[-1].strip())
            if self.ranks.rank == 0:
                shutil.rmtree(self.run / f".step_{step:08d}", ignore_errors=True)

    def write(self, step, staged, record):
        """The checkpoint under a temporary name, on disk to the last byte; then its name, then the pointer, then the old ones go."""
        import torch.distributed.checkpoint as dcp

        rank, world, group = self.ranks.rank, self.ranks.world, self.ranks.saving
        building, alone = self.run / f".step_{step:08d}", world == 1

        def settle(problem):
            """Raises on all ranks what has gone wrong on rank 0."""
            verdict = [problem]
            if not alone:
                dist.broadcast_object_list(verdict, src=0, group=group)
            if verdict[0]:
                raise OSError(verdict[0])

        problem = None
        if rank == 0:
            try:
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir()
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        settle(problem)

        def put(values, where):
            writer = dcp.HuggingFaceStorageWriter(str(where), save_distributed=True)
            dcp.save(values, storage_writer=writer, process_group=group, no_dist=alone)

        put(staged["moments"], building / "optimizer")
        weights = staged["weights"]
        names = file_names({name: value.numel() * value.element_size() for name, value in weights.items()})
        divided = any(hasattr(value, "placements") for value in weights.values())
        if divided:
            put(weights, building / "shards")
        mine = {}
        try:
            for number, (name, inside) in enumerate(names.items()):
                if number % world == rank and divided:  # one file's tensors at a time are whole, on one rank, from what all have written
                    values = {key: torch.empty(weights[key].shape) for key in inside}
                    dcp.load(values, storage_reader=dcp.HuggingFaceStorageReader(str(building / "shards")), no_dist=True)
                    save_file(values, building / name, metadata=dict(format="pt"))
                elif rank == 0 and not divided:
                    save_file({key: weights[key].contiguous() for key in inside}, building / name, metadata=dict(format="pt"))
                else:
                    continue
                (building / name).chmod(0o644)  # safetensors writes for its owner alone
                mine[name] = digest_on_disk(building / name)
                self.files_done += 1
            for file in (building / "optimizer").glob(f"shard-{rank + 1:05d}-*"):
                mine[f"optimizer/{file.name}"] = digest_on_disk(file)
                self.files_done += 1
        except Exception as error:  # the others must hear of it, or they would wait
            problem = f"{type(error).__name__}: {error}"
        everyone = [None] * world if rank == 0 else None
        if alone:
            everyone = [(mine, problem)]
        else:
            dist.gather_object((mine, problem), everyone, group=group)
        if rank == 0:
            problem = next((problem for _, problem in everyone if problem), None)
            if not problem:
                try:
                    self.commit(step, building, dict(record, sha256={k: v for files, _ in everyone for k, v in files.items()}), names)
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
        settle(problem)

    def commit(self, step, building, record, names):
        """What rank 0 does when all files are there."""
        shutil.rmtree(building / "shards", ignore_errors=True)
        if len(names) > 1:
            index = dict(metadata={}, weight_map={key: name for name, inside in names.items() for key in inside})
            (building / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
            record["sha256"]["model.safetensors.index.json"] = digest_on_disk(building / "model.safetensors.index.json")
        (building / "checkpoint.json").write_text(json.dumps(dict(record, record_sha256=record_digest(record)), indent=2) + "\n")
        for path in (building / "checkpoint.json", building / "optimizer", building):
            flush_to_disk(path)
        final = self.run / f"step_{step:08d}"
        discard(final)  # a damaged one of the same step
        building.rename(final)
        flush_to_disk(self.run)
        point_to(final)
        written = checkpoints(self.run)
        place = written.index(final)  # a later one is damaged, or of a course that was given up
        stay = lambda number: number in self.kept_steps or self.keep_every and number % self.keep_every == 0  # noqa: E731
        keep = self.keep + bool(record.get("streak"))  # one saved amid skipped steps is none to go back to
        for old in written[:place] + [p for p in written[place:] if not stay(int(p.name[5:]))][keep:]:
            with contextlib.suppress(OSError):  # this one is safe, whatever keeps an old one from going
                discard(old)

    def forget_after(self, folder):
        """Drop the checkpoints of a course that was given up at `folder`."""
        if self.ranks.rank == 0:
            point_to(folder)
            for later in checkpoints(self.run):
                if later == folder:
                    break
                discard(later)


def file_names(sizes):
    """{file: names of the tensors in it} for {name: bytes}, in files of at most FILE_BYTES, one tensor at least."""
    groups, room = [[]], FILE_BYTES
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = FILE_BYTES
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def point_to(folder):
    """Let run/latest name this checkpoint. On a disk too full for that it goes on naming the one before: nothing depends on it."""
    pointer = folder.with_name(".latest")
    with contextlib.suppress(OSError):
        pointer.write_text(folder.name + "\n")
        flush_to_disk(pointer)
        pointer.replace(folder.with_name("latest"))


def flush_to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_on_disk(path):
    flush_to_disk(path)
    return file_digest(path)


def discard(folder):
    """Remove a checkpoint; a crash in the middle leaves nothing that looks like one."""
    if folder.exists():
        going = folder.with_name(f".gone_{folder.name}")
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going)


HELD = {}  # locks of runs, until this process ends


def lock_run_folder(run, seconds):
    """Let no other process write into a run as long as this one lives; raises OSError if another does so for `seconds`."""
    path = Path(run).resolve() / ".lock"
    if path in HELD:
        return
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file, end = open(path, "w"), time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            HELD[path] = file
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise OSError(f"{run}: another process is training into it; stop that one, or choose another --run_dir") from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return


def remove_leftovers(run):
    """Remove what a crash left half written or half removed."""
    for folder in (*Path(run).glob(".step_*"), *Path(run).glob(".gone_*")):
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- disk space


def checkpoint_bytes(n_params, divided=False):
    """(bytes of a checkpoint, bytes more while it is being written) with weights and two moments in fp32."""
    return 12 * n_params, 4 * n_params * divided


def check_space(run, n_params, divided, n_kept):
    """Raises OSError if the disk cannot hold the checkpoints of a run: `n_kept` at a time and one more in the making."""
    size, more = checkpoint_bytes(n_params, divided)
    folder = Path(run).absolute()
    while not folder.exists():
        folder = folder.parent
    there = sum(p.stat().st_size for pattern in ("step_*", ".step_*", ".gone_*") for p in Path(run).glob(f"{pattern}/**/*") if p.is_file())  # what a crash has left goes
    need, free = (n_kept + 1) * size + more - there, shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"{run}: {n_kept} checkpoints of {size / 1e9:.3g} GB and one in the making need {need / 1e9:.3g} GB more, but only {free / 1e9:.3g} GB are free; "
                      "lower --keep or raise --keep_every, or choose another --run_dir")
