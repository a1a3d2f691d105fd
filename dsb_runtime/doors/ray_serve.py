"""The server of `dsb serve` on a Ray cluster: a deployment of Ray Serve, more replicas under load.

`serve run dsb_runtime.doors.ray_serve:app model=DIR max_replicas=8` starts it. It needs the extra
`ray`.
"""

# Annotations are not postponed here: Serve reads the class of the arguments from that of `app`.
import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.doors.server import KEY, MAX_QUEUE, served_name
from dsb_runtime.engine.batcher import MOST_ROWS
from dsb_runtime.files import absolute_folder

try:
    import ray
    from fastapi import FastAPI
    from ray import serve
except ImportError as error:
    raise ImportError(f"{error}; ray_serve needs the extra: dsb-kernels[ray]") from error


class Args(BaseModel):
    """What `serve run` takes as `name=value`, and a config file of Serve as `args`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = str(MODEL_DIR)
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    family: str | None = None
    mask_id: int | None = None
    max_rows: int = Field(MOST_ROWS, ge=1)
    max_queue: int = Field(MAX_QUEUE, ge=0)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)


def app(args: Args) -> serve.Application:
    """The application of Ray Serve. Each replica has a model, on a GPU of its own where the cluster
    has any and `device` is not the CPU, and answers what `dsb serve` answers. Serve sends up to
    `max_rows + max_queue` requests to a replica, and starts replicas, up to `max_replicas`, while
    they have more than `max_rows` each. The key is the replicas' variable DSB_API_KEY."""
    # The replicas run in folders of their own.
    model = absolute_folder(args.model)
    adapter = args.adapter and absolute_folder(args.adapter)

    def build() -> FastAPI:
        """The ASGI app of a replica. This runs in it."""
        from dsb_runtime.doors.server.app import create_app
        from dsb_runtime.engine.batch import BatchEngine
        from dsb_runtime.models.load import load_model, load_tokenizer

        how: dict[str, Any] = args.model_dump(include={"dtype", "device", "family", "mask_id"})
        engine = BatchEngine(load_model(model, adapter=adapter, **how), args.max_rows)
        return create_app(
            engine, load_tokenizer(model), served_name(model),
            api_key=os.environ.get(KEY) or None, max_queue=args.max_queue,
        )  # fmt: skip

    gpu = args.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
    deployment = serve.deployment(
        name="dsb",
        max_ongoing_requests=args.max_rows + args.max_queue,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if gpu else 0},
        autoscaling_config={
            "min_replicas": args.min_replicas, "max_replicas": args.max_replicas,
            "target_ongoing_requests": args.max_rows,
        },
    )  # fmt: skip
    return deployment(serve.ingress(build)()).bind()
