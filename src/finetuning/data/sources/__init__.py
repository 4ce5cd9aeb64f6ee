"""Sources of rows: files and hub datasets. Each row keeps its file and line for messages."""

from __future__ import annotations

from finetuning.data.samples import json_type
from finetuning.data.sources.files import FileShard, Shard, check_source, find_shards, read_rows
from finetuning.data.sources.hub import HubShard
from finetuning.data.sources.json_reader import Line

__all__ = ["FileShard", "HubShard", "Line", "Shard", "check_source", "find_shards", "json_type", "read_rows"]
