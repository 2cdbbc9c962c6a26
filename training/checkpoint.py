"""Checkpoints: all that a run needs to go on, on any number of ranks, and the weights for use.

    run/step_00000100/
        model.safetensors            whole weights in fp32; beyond 5 GB model-00001-of-0000n.safetensors
                                     and model.safetensors.index.json, as on the Hugging Face hub
        ema/model.safetensors        their moving average, where the run keeps one, likewise
        optimizer/shard-*            the optimizer's state, as the ranks held it
        checkpoint.json              settings, progress, the SHA-256 of every file and of itself
    run/latest                       the newest one's name, for people and scripts

torch.distributed.checkpoint writes and reads them as safetensors, none of its pickles: reading one runs no
code, and a tensor may have been sharded otherwise when it was saved.
"""

import contextlib
import itertools
import json
import os
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from corpus.files import check_file, list_folder, sha256_of, sync_path
from model import ModelConfig, Transformer, shard_like
from training import update
from training.distributed import SINGLE, all_gather, is_dtensor
from training.record import read_record, record_digest
from training.weights import check_dtype, check_weights, read_headers

FILE_BYTES = 5e9  # of weights per file

# said of every save in a single process, which no_dist has asked for
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


# ------------------------------------------------------------------------------------------------- the record


def read_checkpoint(folder, part=0, parts=1):
    """The record of a checkpoint folder, after checking it and its files by SHA-256; raises ValueError.

    OSError where the disk or the network fails: then nothing is known of the checkpoint. Of `parts` ranks
    that share the work, number `part` checks every parts-th file. Records of older versions have today's
    names.
    """
    folder = Path(folder)
    try:
        record = read_record(folder)
        check_files(folder, record["sha256"], part, parts)
        return record
    except (FileNotFoundError, NotADirectoryError) as problem:
        name = type(problem).__name__
        raise ValueError(f"{folder} is no complete checkpoint ({name}: {problem})") from None


def check_files(folder, digests, part, parts):
    """Raises ValueError unless a checkpoint's files are those of its record, {name: SHA-256}."""
    if not any(name.startswith("model") for name in digests):
        raise ValueError(f"{folder / 'checkpoint.json'} lists no weights")
    for name in sorted(digests)[part::parts]:
        path = folder / name
        if not os.path.isfile(path) or sha256_of(path) != digests[name]:
            if os.path.lexists(path):
                check_file(path)  # a pointer of Git LFS has a message of its own
            raise ValueError(f"{path} is missing or damaged")
    files = (list_folder(folder, f"{part}*.safetensors") for part in ("", "optimizer/", "ema/"))
    for path in itertools.chain(*files):
        if path.relative_to(folder).as_posix() not in digests:
            raise ValueError(f"{path} is no part of this checkpoint")


def step_folder(run_dir, step):
    """The folder of a run's checkpoint of a step, whether or not it is there."""
    return Path(run_dir) / f"step_{step:08d}"


def step_of(folder):
    """The step of a checkpoint folder, from its name."""
    return int(folder.name.removeprefix("step_"))


def checkpoints(run_dir):
    """The checkpoint folders of a run, newest first."""
    folders = [path for path in Path(run_dir).glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(folders, key=step_of, reverse=True)


def checkpoints_after(folder):
    """The checkpoint folders of the same run that are newer than `folder`, newest first."""
    return [other for other in checkpoints(folder.parent) if step_of(other) > step_of(folder)]


def load_newest(run_dir, warn, ranks=SINGLE, fit=lambda record: True):
    """(folder, record) of the newest undamaged checkpoint whose record is `fit`; `warn` of damaged ones.

    All ranks choose the same. Raises FileNotFoundError if there is none, OSError if one can't be read, which
    need not be damage.
    """
    folders, reason = all_gather(ranks, checkpoints(run_dir))[0], ""
    for folder in folders:
        record = damage = failure = None
        try:
            record = read_checkpoint(folder, ranks.rank, ranks.world)
        except ValueError as problem:
            damage = str(problem)
        except OSError as problem:
            failure = f"{folder} can't be read: {problem}"
        damages, failures = zip(*all_gather(ranks, (damage, failure)))
        if any(failures):
            raise OSError(next(filter(None, failures)))
        if any(damages) and folder == folders[-1]:
            reason = f": {next(filter(None, damages))}"
        elif any(damages):
            warn(f"{next(filter(None, damages))}; falling back to the checkpoint before it")
        elif fit(record):
            return folder, record
    raise FileNotFoundError(f"no usable checkpoint in '{run_dir}'{reason}")


def newest_record(run_dir):
    """The record of a run's newest checkpoint that has one, None without; no other file is looked at."""
    for folder in checkpoints(run_dir):
        with contextlib.suppress(ValueError, OSError):
            return read_record(folder)
    return None


def print_warning(warning):
    """Print one line for the user."""
    print(f"warning: {warning}", file=sys.stderr)


def open_checkpoint(path, warn=print_warning, ranks=SINGLE):
    """(folder, record) of a checkpoint folder, or of the newest undamaged checkpoint of a run folder.

    Raises FileNotFoundError if there is none, ValueError if that folder is damaged, OSError if it can't be
    read.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no usable checkpoint in '{path}': there is no such folder")
    if (path / "checkpoint.json").is_file():
        return path, read_checkpoint(path, ranks.rank, ranks.world)
    return load_newest(path, warn, ranks)


# -------------------------------------------------------------------------------------------- reading weights


def weights_folder(folder, record, weights="auto", setting="weights"):
    """The folder of a checkpoint's averaged weights (ema; auto: if it has them), or of training's (raw).

    Raises ValueError if it has no averages.
    """
    has_average = any(name.startswith("ema/") for name in record["sha256"])
    if weights == "ema" and not has_average:
        raise ValueError(
            f"{setting}=ema: {folder} keeps no averaged weights; train.py --ema=0.999 makes them")
    return folder / "ema" if has_average and weights != "raw" else folder


def run_of(weights):
    """The run's folder of what `weights_folder` gives."""
    return weights.parent.parent if weights.name == "ema" else weights.parent


def weight_files(folder):
    """The files that hold a checkpoint's weights."""
    return list_folder(folder, "model*.safetensors")


def load_model(folder, record, device="cpu"):
    """Build a checkpoint's network and read its weights (safetensors: no code runs); raises ValueError."""
    config, files = ModelConfig(**record["model"]), weight_files(folder)
    check_weights(folder, config, files)
    with torch.device("meta"):
        model = Transformer(config)
    try:
        weights = {}
        for file in files:
            weights |= load_file(file)
        model.to_empty(device="cpu").load_state_dict(weights)
    except (SafetensorError, RuntimeError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"{folder}: its weights can't be read: {reason}") from None
    return model.init_tables().to(device)


@torch.no_grad()
def init_weights_from(folder, record, network):
    """Give `network` the weights of another checkpoint of its shape; raises ValueError.

    Of the embedding the text tokens' rows count: the mask may have another id now. Its row is the old mask's,
    or, if that has never been seen (an AR model's), the mean of the tokens'. Parameters that the checkpoint
    lacks (a time embedding) stay as they are.
    """
    old, new, files = ModelConfig(**record["model"]), network.config, weight_files(folder)
    check_weights(folder, old, files)
    file_of = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            file_of |= dict.fromkeys(tensors.keys(), file)
    for name, p in network.named_parameters():
        if name not in file_of:
            if name.startswith("time."):
                continue
            raise ValueError(f"{folder} has no {name}")
        with safe_open(file_of[name], "pt") as tensors:
            values = tensors.get_tensor(name)
        if name in ("embed.weight", "lm_head.weight"):
            text = values[: new.n_vocab].float()
            rows = text.new_zeros(p.shape)
            rows[: new.n_vocab] = text
            rows[new.mask_id] = text.mean(0) if old.causal else values[old.mask_id].float()
            values = rows
        if values.shape != p.shape:
            shapes = f"{tuple(values.shape)}, and should be {tuple(p.shape)}"
            raise ValueError(f"{folder}: {name} is {shapes}")
        p.copy_(shard_like(values, p))


def restore(folder, record, network, optimizer, average=None, ranks=SINGLE):
    """Read weights and optimizer state in place, whatever layout they were saved in; raises ValueError.

    And a WeightAverage, which begins anew where the checkpoint has none.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception by descent

    check_weights(folder, ModelConfig(**record["model"]), weight_files(folder))
    for name, header in read_headers(list_folder(folder, "optimizer/*.safetensors")).items():
        check_dtype(folder / "optimizer", name, header.dtype)
    update.init_state(optimizer, record["updates"])
    parts = {folder: weight_tensors(network), folder / "optimizer": update.state_tensors(network, optimizer)}
    averages = weights_folder(folder, record)
    if average and averages != folder:
        check_weights(averages, ModelConfig(**record["model"]), weight_files(averages))
        parts[averages] = average.weights
    try:
        for place, values in parts.items():
            dcp.load(values, storage_reader=open_reader(place), process_group=ranks.saving,
                     no_dist=ranks.world == 1)
    except (Exception, CheckpointException) as problem:  # of many types: dcp's own, safetensors', each rank's
        lines = [line for line in str(problem).splitlines() if line.strip()]
        reason = lines[-1] if lines else ""
        raise ValueError(f"{folder} can't be read: {type(problem).__name__}: {reason}") from None
    if average and averages == folder:
        if ranks.rank == 0:
            print_warning(f"{folder} keeps no averaged weights: the average begins with its own")
        average.start()


def open_reader(folder):
    """torch's reader of a folder of .safetensors; by itself it takes a ._model.safetensors for one."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    reader.fs.ls = lambda path: list(map(str, list_folder(path)))
    return reader


def weight_tensors(network):
    """{name: the parameter's values, in place}."""
    return {name: p.detach() for name, p in network.named_parameters()}


# ---------------------------------------------------------------------------------------------------- writing


class Saver:
    """Writes checkpoints in a thread while training goes on.

    Every rank calls the same methods in the same order.
    """

    def __init__(self, run_dir, network, optimizer, ranks, keep, keep_every=0, kept_steps=(),
                 alive=lambda: None, average=None):
        """keep, keep_every, kept_steps: which ones stay. `alive` is called while `wait` sees progress.

        average: a WeightAverage, to be saved, too.
        """
        from torch.distributed.checkpoint.staging import (  # takes a second to import
            DefaultStager,
            StagingOptions,
        )

        self.run_dir, self.network, self.optimizer, self.ranks = Path(run_dir), network, optimizer, ranks
        self.keep, self.keep_every, self.kept_steps = keep, keep_every, kept_steps
        self.average, self.alive, self.files_done = average, alive, 0
        gpu = network.embed.weight.device.type == "cuda"
        self.stager = DefaultStager(StagingOptions(
            use_pinned_memory=gpu, use_non_blocking_copy=gpu, use_shared_memory=False, use_async_staging=False
        ))
        self.thread = None
        self.failure = self.unreported = None  # dict(of=step, why=…) of the last save, if it failed

    def save(self, step, record):
        """Copy the state, then let it be written as run/step_<step>/; waits for the save before this one."""
        self.wait()
        weights, moments = weight_tensors(self.network), update.state_tensors(self.network, self.optimizer)
        averages = self.average.weights if self.average else {}
        if not any(map(is_dtensor, weights.values())):  # all ranks have all: each copies its part alone
            rank, world = self.ranks.rank, self.ranks.world
            weights, averages = (weights, averages) if rank == 0 else ({}, {})
            moments = dict(list(moments.items())[rank::world])
        staged = self.stager.stage(dict(weights=weights, averages=averages, moments=moments))
        record = dict(record, step=step, updates=update.updates(self.optimizer))
        record = json.loads(json.dumps(record))  # what it holds goes on changing
        self.thread = threading.Thread(target=self.work, args=(step, staged, record), daemon=True)
        self.thread.start()

    def wait(self):
        """Wait until nothing is being written."""
        before = None
        while self.thread and self.thread.is_alive():
            self.thread.join(timeout=1)
            if (now := self.progress()) != before:
                before = now
                self.alive()
        self.thread = None

    def progress(self):
        """A value that changes while the thread gets on."""
        sizes = 0
        for path in self.run_dir.glob(".step_*/**/*"):
            with contextlib.suppress(OSError):
                sizes += path.stat().st_size
        return self.files_done, sizes

    def take_failure(self):
        """A failure that was not reported yet, or None."""
        failure, self.unreported = self.unreported, None
        return failure

    def work(self, step, staged, record):
        """The thread's work: write, and keep what went wrong."""
        try:
            self.write(step, staged, record)
            self.failure = None
        except BaseException as problem:  # a full disk, here or on another rank, must not end a long run
            lines = [line for line in str(problem).splitlines() if "Error" in line] or [str(problem)]
            self.failure = self.unreported = dict(of=step, why=lines[-1].strip())
            if self.ranks.rank == 0:
                shutil.rmtree(self.run_dir / f".step_{step:08d}", ignore_errors=True)

    def write(self, step, staged, record):
        """Write all files under a temporary name, to the last byte; then change name and pointer."""
        building = self.run_dir / f".step_{step:08d}"
        problem = None
        if self.ranks.rank == 0:
            try:
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir()
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        self.raise_everywhere(problem)

        # all ranks together, then each its own files
        sets = {"": staged["weights"]} | ({"ema": staged["averages"]} if self.average else {})
        sharded = any(map(is_dtensor, staged["weights"].values()))
        self.write_shards(staged["moments"], building / "optimizer")
        for part, weights in sets.items() if sharded else ():
            self.write_shards(weights, building / part / "shards")
        digests = {}
        try:
            for part, weights in sets.items():
                digests |= self.write_whole_files(weights, building, part, sharded)
            for file in (building / "optimizer").glob(f"shard-{self.ranks.rank + 1:05d}-*"):
                digests[f"optimizer/{file.name}"] = digest_on_disk(file)
                self.files_done += 1
        except Exception as error:  # the others must hear of it, or they would wait
            problem = f"{type(error).__name__}: {error}"

        # rank 0 gathers what all ranks have written, and gives the checkpoint its name
        parts = [(digests, problem)]
        if self.ranks.world > 1:
            parts = [None] * self.ranks.world if self.ranks.rank == 0 else None
            dist.gather_object((digests, problem), parts, group=self.ranks.saving)
        if self.ranks.rank == 0:
            problem = next((problem for _, problem in parts if problem), None)
            if not problem:
                try:
                    for digests, _ in parts:
                        record.setdefault("sha256", {}).update(digests)
                    self.commit(step, building, record)
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
        self.raise_everywhere(problem)

    def raise_everywhere(self, problem):
        """Raise OSError on all ranks if something has gone wrong on rank 0."""
        verdict = [problem]
        if self.ranks.world > 1:
            dist.broadcast_object_list(verdict, src=0, group=self.ranks.saving)
        if verdict[0]:
            raise OSError(verdict[0])

    def write_shards(self, values, folder):
        """Write tensors as the ranks hold them."""
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        alone, group = self.ranks.world == 1, self.ranks.saving
        dcp.save(values, storage_writer=writer, process_group=group, no_dist=alone)

    def write_whole_files(self, weights, building, part, sharded):
        """Write this rank's share of the files of whole weights → {file: SHA-256}.

        One file's tensors at a time are whole, on one rank, from what all have written. part: "" or "ema".
        """
        import torch.distributed.checkpoint as dcp

        rank, world, digests, folder = self.ranks.rank, self.ranks.world, {}, building / part
        folder.mkdir(exist_ok=True)
        names = file_names({name: value.numel() * value.element_size() for name, value in weights.items()})
        for number, (name, keys) in enumerate(names.items()):
            if number % world == rank and sharded:
                values = {key: torch.empty(weights[key].shape) for key in keys}
                dcp.load(values, storage_reader=open_reader(folder / "shards"), no_dist=True)
            elif rank == 0 and not sharded:
                values = {key: weights[key].contiguous() for key in keys}
            else:
                continue
            path = folder / name
            save_file(values, path, metadata=dict(format="pt"))
            path.chmod(0o644)  # safetensors writes for its owner alone
            digests[path.relative_to(building).as_posix()] = digest_on_disk(path)
            self.files_done += 1
        if rank == 0 and len(names) > 1:
            index = dict(metadata={}, weight_map={key: name for name, keys in names.items() for key in keys})
            path = folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            digests[path.relative_to(building).as_posix()] = digest_on_disk(path)
        return digests

    def commit(self, step, building, record):
        """Give a checkpoint whose files are all there its name, and remove the old ones: rank 0's work."""
        for part in ("", "ema"):
            shutil.rmtree(building / part / "shards", ignore_errors=True)
        record = dict(record, record_sha256=record_digest(record))
        (building / "checkpoint.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        folders = building / "optimizer", building / "ema"
        for path in (building / "checkpoint.json", *filter(Path.is_dir, folders), building):
            sync_path(path)
        final = step_folder(self.run_dir, step)
        if final.exists():
            set_aside(final)
        building.rename(final)
        sync_path(self.run_dir)
        point_to(final)
        self.remove_old(final, amid_bad_steps=bool(record.get("bad_in_a_row")))

    def remove_old(self, newest, amid_bad_steps):
        """Remove the checkpoints that need not stay."""
        folders = checkpoints(self.run_dir)
        older = folders[folders.index(newest) :]
        passing = [folder for folder in older if not self.stays(step_of(folder))]
        keep = self.keep + amid_bad_steps  # one saved amid bad steps is none to go back to
        for folder in passing[keep:]:
            with contextlib.suppress(OSError):  # the newest is safe, whatever keeps an old one from going
                discard(folder)

    def stays(self, step):
        """Whether the checkpoint of a step stays for good."""
        return step in self.kept_steps or bool(self.keep_every) and step % self.keep_every == 0

    def forget_after(self, folder):
        """Drop the checkpoints of a course that was given up at `folder`; damaged ones are set aside."""
        if self.ranks.rank == 0:
            point_to(folder)
            for later in checkpoints_after(folder):
                with contextlib.suppress(ValueError, OSError):
                    read_checkpoint(later)
                    discard(later)
            set_aside_after(folder)


def file_names(sizes):
    """{file: names of its tensors} for {name: bytes}, in files of at most FILE_BYTES, or one tensor."""
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
    """Let run/latest name this checkpoint.

    On a disk too full for that it goes on naming the one before: nothing depends on it.
    """
    pointer = folder.with_name(".latest")
    with contextlib.suppress(OSError):
        pointer.write_text(folder.name + "\n", encoding="utf-8")
        sync_path(pointer)
        pointer.replace(folder.with_name("latest"))


def digest_on_disk(path):
    """SHA-256 of a file, once it is on the disk."""
    sync_path(path)
    return sha256_of(path)


def discard(folder):
    """Remove a checkpoint; a crash in the middle leaves nothing that looks like one."""
    if folder.exists():
        going = folder.with_name(f".gone_{folder.name}")
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going)


def set_aside(folder):
    """Give a checkpoint that can't be read another name, under which nothing looks for it or removes it."""
    number, place = 1, folder.with_name(f"damaged_{folder.name}")
    while place.exists():
        number += 1
        place = folder.with_name(f"damaged_{folder.name}_{number}")
    folder.rename(place)
    print_warning(f"{folder} is kept as {place.name}")


def set_aside_after(folder):
    """Set aside the checkpoints that a fallback to `folder` has passed over."""
    for later in checkpoints_after(folder):
        set_aside(later)


HELD = {}  # locks of run folders, until this process ends


def lock_run_folder(run_dir, seconds):
    """Let no other process write into a run folder as long as this one lives.

    Raises OSError if another does so for `seconds`. A link in the lock's place is not followed, and what
    stands in the file is left alone: it may be somebody else's.
    """
    path = Path(run_dir).resolve() / ".lock"
    if path in HELD:
        return
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as problem:
        raise OSError(f"{path} can't be opened as a lock: {problem.strerror}; remove it") from None
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            HELD[path] = file
            return
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(file)
                raise OSError(f"{run_dir}: another process is training into it; stop that one, "
                              "or choose another --run_dir") from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return


def remove_leftovers(run_dir):
    """Remove what a crash left half written or half removed."""
    for folder in (*Path(run_dir).glob(".step_*"), *Path(run_dir).glob(".gone_*")):
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- disk space


def checkpoint_bytes(network, optimizer, ema, sharded):
    """(bytes of a checkpoint, bytes more while it is being written); weights and state are in fp32."""
    weights = 4 * network.n_params()
    size = weights + 4 * update.state_numbers(network, optimizer, ema)
    return size, weights * (1 + bool(ema)) * sharded


def check_space(run_dir, size, temporary, n_kept):
    """Raises OSError if the disk can't hold a run's checkpoints: `n_kept` at a time and one in the making.

    size and temporary as `checkpoint_bytes` returns them.
    """
    folder = Path(run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    there = 0  # the run's checkpoints, and what a crash has left of some: they will go
    for pattern in ("step_*", ".step_*", ".gone_*"):
        there += sum(path.stat().st_size for path in Path(run_dir).glob(f"{pattern}/**/*") if path.is_file())
    need, free = (n_kept + 1) * size + temporary - there, shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"{run_dir}: {n_kept} checkpoints of {size / 1e9:.3g} GB and one in the making need "
                      f"{need / 1e9:.3g} GB more, but only {free / 1e9:.3g} GB are free; "
                      "lower --keep or raise --keep_every, or choose another --run_dir")
