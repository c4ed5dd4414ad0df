"""The runs of a report for TensorBoard's HPARAMS tab: their settings and what they came to.

Each run gets an event file of its own, which holds one session of the plug-in: its settings, its
results, and that it is over. `tensorboard --logdir` on the folder of a sweep finds them below
`report/hparams/`, beside the curves of the runs. The messages are those of TensorBoard's
plugins/hparams/{api,plugin_data}.proto, which tensorboardX has too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sapo_jax.io.tensorboard import import_tensorboardx, tfrecord

PLUGIN = "hparams"
EVENT_FILE = "events.out.tfevents.0000000001.sapo_jax"

Settings = Mapping[str, Any]  # config keys and what the run has there
Results = Mapping[str, float]  # metrics and their values


def write_hparams(folder: Path, runs: Mapping[str, tuple[Settings, Results]]) -> Path:
    """Writes a session for each run, by its name, below `folder`; earlier sessions are removed."""
    event_pb2, masked_crc32c = import_tensorboardx()
    for old_file in folder.rglob(EVENT_FILE):
        old_file.unlink()
    experiment = _experiment(list(runs.values()))
    now = time.time()
    for name, (settings, results) in runs.items():
        events = [event_pb2.Event(wall_time=now, file_version="brain.Event:2")]
        for tag, content in (
            ("_hparams_/experiment", experiment),
            ("_hparams_/session_start_info", _session_start(settings, now)),
            ("_hparams_/session_end_info", _session_end(now)),
        ):
            event = event_pb2.Event(wall_time=now)
            value = event.summary.value.add(tag=tag)
            value.metadata.plugin_data.plugin_name = PLUGIN
            value.metadata.plugin_data.content = content
            events.append(event)
        event = event_pb2.Event(wall_time=now)
        for tag, result in results.items():
            event.summary.value.add(tag=tag, simple_value=result)
        events.append(event)
        path = folder / name / EVENT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [tfrecord(event.SerializeToString(), masked_crc32c) for event in events]
        path.write_bytes(b"".join(records))
    return folder


def _messages() -> tuple[Any, Any]:
    """The messages of the plug-in in tensorboardX, which are made at run time: without types."""
    from tensorboardX.proto import api_pb2, plugin_hparams_pb2

    return api_pb2, plugin_hparams_pb2


def _experiment(runs: Sequence[tuple[Settings, Results]]) -> bytes:
    """Which settings and results there are, over all runs."""
    api_pb2, plugin_hparams_pb2 = _messages()
    experiment = api_pb2.Experiment()
    values_of_key: dict[str, list[Any]] = {}
    for settings, _ in runs:
        for key, value in settings.items():
            values_of_key.setdefault(key, []).append(value)
    for key, values in values_of_key.items():
        kind = "DATA_TYPE_STRING"
        if all(_is_number(value) for value in values):
            kind = "DATA_TYPE_FLOAT64"
        elif all(isinstance(value, bool) for value in values):
            kind = "DATA_TYPE_BOOL"
        experiment.hparam_infos.add(name=key, type=api_pb2.DataType.Value(kind))
    for tag in dict.fromkeys(tag for _, results in runs for tag in results):
        experiment.metric_infos.add().name.tag = tag
    data = plugin_hparams_pb2.HParamsPluginData(experiment=experiment, version=0)
    return data.SerializeToString()


def _session_start(settings: Settings, now: float) -> bytes:
    _, plugin_hparams_pb2 = _messages()
    data = plugin_hparams_pb2.HParamsPluginData(version=0)
    data.session_start_info.start_time_secs = now
    for key, value in settings.items():
        if isinstance(value, bool):
            data.session_start_info.hparams[key].bool_value = value
        elif _is_number(value):
            data.session_start_info.hparams[key].number_value = value
        else:
            data.session_start_info.hparams[key].string_value = str(value)
    return data.SerializeToString()


def _session_end(now: float) -> bytes:
    api_pb2, plugin_hparams_pb2 = _messages()
    data = plugin_hparams_pb2.HParamsPluginData(version=0)
    data.session_end_info.status = api_pb2.Status.Value("STATUS_SUCCESS")
    data.session_end_info.end_time_secs = now
    return data.SerializeToString()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
