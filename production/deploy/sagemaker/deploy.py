#!/usr/bin/env python3
"""Train and host the image on SageMaker, with boto3 alone. `deploy.py COMMAND --help` has the options.

train        run a training job, and wait for its model
endpoint     host a model archive, or a model of the hub, and wait until it answers
update       host another model or image behind an endpoint that is there, without an interruption
autoscale    let an endpoint grow and shrink by the requests of an instance
multi-model  host all archives below a prefix of S3 behind one endpoint
transform    answer the lines of files on S3 in a batch transform job, with a model that an endpoint has
delete       remove an endpoint, and its configuration and model

`--dry-run` prints the calls to AWS as JSON, one a line, and makes none.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

METRICS = {
    "train:loss": r"epoch=\d+; train_loss=([0-9.]+);",
    "validation:loss": r" validation_loss=([0-9.]+);",
    "validation:accuracy": r" validation_accuracy=([0-9.]+);",
    "validation:macro_f1": r" validation_macro_f1=([0-9.]+);",
    "test:accuracy": r"test_accuracy=([0-9.]+);",
    "test:macro_f1": r"test_macro_f1=([0-9.]+);",
}
"""What a training prints, as the regular expressions that the platform looks for; the README has them too."""
VARIANT = "main"
PAYLOAD_MB = 6


class Aws:
    """AWS's API: calls by service and operation; dry, they are printed and answered with nothing."""

    def __init__(self, region: str | None, *, dry_run: bool) -> None:
        self.dry_run, self._region, self._clients = dry_run, region, dict[str, Any]()

    def client(self, service: str) -> Any:
        """boto3's, made once."""
        if service not in self._clients:
            import boto3

            self._clients[service] = boto3.client(service, region_name=self._region)
        return self._clients[service]

    def call(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]:
        """Make a call."""
        if self.dry_run:
            print(json.dumps({"service": service, "operation": operation, "parameters": parameters}))
            return {}
        return dict(getattr(self.client(service), operation)(**parameters))

    def wait(self, waiter: str, **parameters: Any) -> None:
        """Wait until something is as it should be, for an hour at most."""
        if not self.dry_run:
            self.client("sagemaker").get_waiter(waiter).wait(
                **parameters, WaiterConfig={"Delay": 15, "MaxAttempts": 240}
            )


def train(aws: Aws, wanted: argparse.Namespace) -> None:
    """Run a training job."""
    name = wanted.name
    channels = {"train": wanted.data, "validation": wanted.validation, "test": wanted.test, "model": wanted.base_model}
    job: dict[str, Any] = {
        "TrainingJobName": name,
        "RoleArn": wanted.role,
        "AlgorithmSpecification": {
            "TrainingImage": wanted.image,
            "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": metric, "Regex": regex} for metric, regex in METRICS.items()],
        },
        "HyperParameters": dict(pair.split("=", 1) for pair in wanted.hyperparameter),
        "InputDataConfig": [
            {
                "ChannelName": channel,
                "DataSource": {
                    "S3DataSource": {
                        "S3DataType": "S3Prefix",
                        "S3Uri": uri,
                        "S3DataDistributionType": "FullyReplicated",
                    }
                },
            }
            for channel, uri in channels.items()
            if uri
        ],
        "OutputDataConfig": {"S3OutputPath": wanted.output},
        "ResourceConfig": {
            "InstanceType": wanted.instance,
            "InstanceCount": wanted.instances,
            "VolumeSizeInGB": wanted.volume_gb,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": wanted.max_hours * 3600},
        "EnableNetworkIsolation": wanted.isolated,
    }
    if wanted.checkpoints:
        job["CheckpointConfig"] = {"S3Uri": wanted.checkpoints, "LocalPath": "/opt/ml/checkpoints"}
    if wanted.spot:
        job["EnableManagedSpotTraining"] = True
        job["StoppingCondition"]["MaxWaitTimeInSeconds"] = 2 * wanted.max_hours * 3600
    aws.call("sagemaker", "create_training_job", **job)
    if wanted.no_wait or aws.dry_run:
        return
    aws.wait("training_job_completed_or_stopped", TrainingJobName=name)
    found = aws.call("sagemaker", "describe_training_job", TrainingJobName=name)
    if found["TrainingJobStatus"] != "Completed":
        raise SystemExit(f"{name}: {found['TrainingJobStatus']}: {found.get('FailureReason', 'it was stopped')}")
    print(found["ModelArtifacts"]["S3ModelArtifacts"])


def create_model(aws: Aws, wanted: argparse.Namespace, name: str, *, many: bool = False) -> None:
    """Make a model: an image, perhaps with an archive or a prefix of archives, and variables."""
    container: dict[str, Any] = {"Image": wanted.image, "Environment": dict(one.split("=", 1) for one in wanted.env)}
    if getattr(wanted, "hub_model", ""):
        container["Environment"] |= {"HF_MODEL_ID": wanted.hub_model, "HF_TASK": wanted.task}
    if wanted.model_data:
        container["ModelDataUrl"] = wanted.model_data
    if many:
        container["Mode"] = "MultiModel"
    aws.call(
        "sagemaker",
        "create_model",
        ModelName=name,
        PrimaryContainer=container,
        ExecutionRoleArn=wanted.role,
        EnableNetworkIsolation=wanted.isolated,
    )


def create_config(aws: Aws, wanted: argparse.Namespace, name: str) -> None:
    """Make an endpoint's configuration, of the same name as its model."""
    variant: dict[str, Any] = {"VariantName": VARIANT, "ModelName": name}
    if wanted.serverless_mb:
        variant["ServerlessConfig"] = {"MemorySizeInMB": wanted.serverless_mb, "MaxConcurrency": wanted.concurrency}
    else:
        variant |= {
            "InstanceType": wanted.instance,
            "InitialInstanceCount": wanted.instances,
            "ContainerStartupHealthCheckTimeoutInSeconds": wanted.startup_s,
        }
    aws.call("sagemaker", "create_endpoint_config", EndpointConfigName=name, ProductionVariants=[variant])


def endpoint(aws: Aws, wanted: argparse.Namespace, *, many: bool = False) -> None:
    """Host a model behind a new endpoint."""
    made = f"{wanted.name}-{wanted.suffix}"
    create_model(aws, wanted, made, many=many)
    create_config(aws, wanted, made)
    aws.call("sagemaker", "create_endpoint", EndpointName=wanted.name, EndpointConfigName=made)
    if not wanted.no_wait:
        aws.wait("endpoint_in_service", EndpointName=wanted.name)


def multi_model(aws: Aws, wanted: argparse.Namespace) -> None:
    """Host all archives below a prefix behind a new endpoint."""
    endpoint(aws, wanted, many=True)


def update(aws: Aws, wanted: argparse.Namespace) -> None:
    """Host another model behind an endpoint; what it had is removed once the other answers."""
    made = f"{wanted.name}-{wanted.suffix}"
    before = aws.call("sagemaker", "describe_endpoint", EndpointName=wanted.name).get("EndpointConfigName")
    create_model(aws, wanted, made)
    create_config(aws, wanted, made)
    kept = {} if wanted.serverless_mb else {"RetainAllVariantProperties": True}  # as many instances as it has scaled to
    aws.call("sagemaker", "update_endpoint", EndpointName=wanted.name, EndpointConfigName=made, **kept)
    if wanted.no_wait:
        return
    aws.wait("endpoint_in_service", EndpointName=wanted.name)
    if before:
        remove_config(aws, before)


def autoscale(aws: Aws, wanted: argparse.Namespace) -> None:
    """Register an endpoint for scaling, by the requests a minute of one instance."""
    target = {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{wanted.name}/variant/{VARIANT}",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }
    aws.call(
        "application-autoscaling",
        "register_scalable_target",
        **target,
        MinCapacity=wanted.least,
        MaxCapacity=wanted.most,
    )
    aws.call(
        "application-autoscaling",
        "put_scaling_policy",
        **target,
        PolicyName=f"{wanted.name}-requests",
        PolicyType="TargetTrackingScaling",
        TargetTrackingScalingPolicyConfiguration={
            "TargetValue": wanted.requests_a_minute,
            "PredefinedMetricSpecification": {
                "PredefinedMetricType": "SageMakerVariantInvocationsPerInstance",
            },
            "ScaleInCooldown": 300,
            "ScaleOutCooldown": 60,
        },
    )


def transform(aws: Aws, wanted: argparse.Namespace) -> None:
    """Answer the lines of files on S3: a line out for each."""
    found = aws.call("sagemaker", "describe_endpoint", EndpointName=wanted.name)
    aws.call(
        "sagemaker",
        "create_transform_job",
        TransformJobName=f"{wanted.name}-{wanted.suffix}",
        ModelName=found.get("EndpointConfigName", f"{wanted.name}-…"),  # a configuration is named as its model
        BatchStrategy="MultiRecord",
        MaxPayloadInMB=PAYLOAD_MB,
        TransformInput={
            "DataSource": {"S3DataSource": {"S3DataType": "S3Prefix", "S3Uri": wanted.data}},
            "ContentType": wanted.content_type,
            "SplitType": "Line",
        },
        TransformOutput={"S3OutputPath": wanted.output, "AssembleWith": "Line", "Accept": wanted.accept},
        TransformResources={"InstanceType": wanted.instance, "InstanceCount": wanted.instances},
    )


def delete(aws: Aws, wanted: argparse.Namespace) -> None:
    """Remove an endpoint, its configuration and its model."""
    found = aws.call("sagemaker", "describe_endpoint", EndpointName=wanted.name)
    aws.call("sagemaker", "delete_endpoint", EndpointName=wanted.name)
    remove_config(aws, found.get("EndpointConfigName", f"{wanted.name}-…"))


def remove_config(aws: Aws, name: str) -> None:
    """Remove a configuration and the model of its name."""
    aws.call("sagemaker", "delete_endpoint_config", EndpointConfigName=name)
    aws.call("sagemaker", "delete_model", ModelName=name)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    anything = argparse.ArgumentParser(add_help=False)
    anything.add_argument("name", help="of the endpoint, or of the training job")
    anything.add_argument("--region", help="of AWS; by default the profile's")
    anything.add_argument("--dry-run", action="store_true", help="print the calls, make none")
    anything.add_argument("--no-wait", action="store_true", help="return at once")
    anything.add_argument("--suffix", default=time.strftime("%Y%m%d%H%M%S", time.gmtime()), help=argparse.SUPPRESS)
    image = argparse.ArgumentParser(add_help=False)
    image.add_argument("--image", required=True, help="in ECR, built with --target sagemaker")
    image.add_argument("--role", required=True, help="ARN of the execution role")
    image.add_argument("--isolated", action="store_true", help="without a network; then nothing comes from the hub")
    machines = argparse.ArgumentParser(add_help=False)
    machines.add_argument("--instance", default="ml.m5.xlarge", help="type of the instances")
    machines.add_argument("--instances", type=int, default=1, help="how many")
    hosted = argparse.ArgumentParser(add_help=False, parents=[image, machines])
    hosted.add_argument("--model-data", default="", help="s3://…/model.tar.gz; for multi-model a prefix")
    hosted.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the container")
    hosted.add_argument("--startup-s", type=int, default=300, help="seconds in which /ping must pass, 60 to 3600")
    hosted.add_argument("--serverless-mb", type=int, default=0, help="memory of a serverless endpoint")
    hosted.add_argument("--concurrency", type=int, default=5, help="of a serverless endpoint")
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("--hub-model", default="", help="a model of the Hugging Face hub instead of --model-data")
    one.add_argument("--task", default="text-classification", help="of --hub-model")

    training = commands.add_parser("train", parents=[anything, image, machines])
    training.add_argument("--data", required=True, help="s3://… of the channel train")
    training.add_argument("--validation", default="", help="s3://…")
    training.add_argument("--test", default="", help="s3://…")
    training.add_argument("--base-model", default="", help="s3://… of a Hugging Face folder")
    training.add_argument("--output", required=True, help="s3://… where model.tar.gz goes")
    training.add_argument("--checkpoints", default="", help="s3://… of the store, to go on from")
    training.add_argument("--spot", action="store_true", help="managed spot training; wants --checkpoints")
    training.add_argument("--max-hours", type=int, default=24)
    training.add_argument("--volume-gb", type=int, default=50)
    training.add_argument("--hyperparameter", action="append", default=[], metavar="NAME=VALUE", help="lr=3e-5")
    commands.add_parser("endpoint", parents=[anything, hosted, one])
    commands.add_parser("update", parents=[anything, hosted, one])
    commands.add_parser("multi-model", parents=[anything, hosted])
    scale = commands.add_parser("autoscale", parents=[anything])
    scale.add_argument("--least", type=int, default=1, help="instances")
    scale.add_argument("--most", type=int, default=4, help="instances")
    scale.add_argument("--requests-a-minute", type=float, default=1000, help="that one instance should have")
    batch = commands.add_parser("transform", parents=[anything, machines])
    batch.add_argument("--data", required=True, help="s3://… of files without a header")
    batch.add_argument("--output", required=True, help="s3://…")
    batch.add_argument(
        "--content-type", default="text/csv", choices=["text/csv", "application/jsonlines", "text/plain"]
    )
    batch.add_argument("--accept", default="application/jsonlines", choices=["application/jsonlines", "text/csv"])
    commands.add_parser("delete", parents=[anything])
    wanted = parser.parse_args(arguments)
    if wanted.command in ("endpoint", "update") and bool(wanted.model_data) == bool(wanted.hub_model):
        parser.error("one of --model-data and --hub-model names the model")
    if wanted.command == "train" and wanted.spot and not wanted.checkpoints:
        parser.error("--spot wants --checkpoints, or an interruption loses all")
    if wanted.command == "multi-model" and not wanted.model_data.endswith("/"):
        parser.error("--model-data is the prefix of the archives, with a / at its end")
    return wanted


COMMANDS = {
    "train": train,
    "endpoint": endpoint,
    "update": update,
    "autoscale": autoscale,
    "multi-model": multi_model,
    "transform": transform,
    "delete": delete,
}


def main(arguments: Sequence[str], aws: Aws | None = None) -> None:
    """Run a command."""
    wanted = parse(arguments)
    COMMANDS[wanted.command](aws or Aws(wanted.region, dry_run=wanted.dry_run), wanted)


if __name__ == "__main__":
    main(sys.argv[1:])
