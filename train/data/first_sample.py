"""What a plan must know of the data: which windows predict."""

import re
import tarfile

from powernap.train.config import Recipe
from powernap.train.data.sample import DataError, decode
from powernap.train.data.shard_list import expand_shards, local_path


def predicting_windows(recipe: Recipe) -> list[bool] | None:
    """Which windows of the first training sample hold loss tokens, or None if no shard is here yet.

    Raises:
        DataError: if the sample is there and does not fit the recipe.
    """
    try:
        shard = expand_shards(recipe.data.train)[0]
        members = _first_members(shard)
    except (DataError, OSError, tarfile.TarError):
        return None
    sample = decode(members, recipe.data.sequence_length, recipe.model.vocab_size)
    targets, window = sample.loss_mask[1:], recipe.model.window  # a token's target is the one after it
    return [bool(targets[start : start + window].any()) for start in range(0, len(targets), window)]


def _first_members(shard: str) -> dict[str, object]:
    """With Python's own tarfile: read_shard imports torch, which takes seconds."""
    if local_path(shard) is None:
        raise DataError(f"{shard}: not on this machine")
    with tarfile.open(local_path(shard)) as tar:
        members, key = {}, None
        for member in filter(tarfile.TarInfo.isfile, tar):
            name, kind = re.fullmatch(r"((?:.*/)?[^/.]*)\.?(.*)", member.name).groups()  # as WebDataset names samples
            if key not in (None, name):
                break
            key, members[kind] = name, tar.extractfile(member).read()
    return {"__key__": key, "__url__": shard, **members}
