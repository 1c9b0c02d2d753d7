"""The deployment script of SageMaker: against moto, with botocore's Stubber for what moto lacks, and dry."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from platforms.conftest import Client

from tuneserve.settings import PROJECT

DEPLOY = PROJECT / "production" / "deploy" / "sagemaker" / "deploy.py"
HOSTED = ["--image", "1.dkr.ecr.eu-west-1.amazonaws.com/tuneserve:1", "--role", "arn:aws:iam::123456789012:role/sage"]
TRAIN = ["train", "reviews-1", *HOSTED, "--data", "s3://b/train/", "--output", "s3://b/out/"]

SCRIPT = """
import json, os, sys
os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "eu-west-1"}
sys.path.insert(0, sys.argv[1])
import boto3, deploy
from botocore.stub import Stubber
from moto import mock_aws
hosted, train = json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = {}
with mock_aws():
    aws = deploy.Aws(None, dry_run=False)
    sagemaker = aws.client("sagemaker")
    deploy.main(["endpoint", "reviews", *hosted, "--model-data", "s3://b/model.tar.gz",
                 "--env", "NUM_MAX_POSITIONS=128", "--suffix", "1"], aws)
    found["status"] = sagemaker.describe_endpoint(EndpointName="reviews")["EndpointStatus"]
    found["model"] = sagemaker.describe_model(ModelName="reviews-1")["PrimaryContainer"]
    found["variants"] = sagemaker.describe_endpoint_config(EndpointConfigName="reviews-1")["ProductionVariants"]
    deploy.main(["autoscale", "reviews", "--most", "8"], aws)
    scaling = aws.client("application-autoscaling")
    [target] = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    [policy] = scaling.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    found["scaling"] = [target["ResourceId"], target["MaxCapacity"], policy["PolicyType"]]
    deploy.main(["transform", "reviews", "--data", "s3://b/in/", "--output", "s3://b/out/", "--suffix", "1"], aws)
    found["transform"] = sagemaker.describe_transform_job(TransformJobName="reviews-1")["ModelName"]
    deploy.main(["delete", "reviews"], aws)
    found["left"] = [len(sagemaker.list_endpoints()["Endpoints"]), len(sagemaker.list_models()["Models"])]
    deploy.main(["multi-model", "many", *hosted, "--model-data", "s3://b/models/", "--suffix", "1"], aws)
    found["mode"] = sagemaker.describe_model(ModelName="many-1")["PrimaryContainer"]["Mode"]
    deploy.main([*train, "--hyperparameter", "lr=3e-5", "--spot", "--checkpoints", "s3://b/store/"], aws)
    job = sagemaker.describe_training_job(TrainingJobName="reviews-1")
    found["job"] = [job["HyperParameters"], job["TrainingJobStatus"], job["InputDataConfig"][0]["ChannelName"]]

    # What moto does not have: an update.
    stub = Stubber(sagemaker)
    stub.add_response("describe_endpoint", {
        "EndpointName": "many", "EndpointArn": "arn:aws:sagemaker:eu-west-1:1:endpoint/many",
        "EndpointConfigName": "many-1", "EndpointStatus": "InService", "CreationTime": 0, "LastModifiedTime": 0,
    }, {"EndpointName": "many"})
    arn = "arn:aws:sagemaker:eu-west-1:123456789012:"
    stub.add_response("create_model", {"ModelArn": arn + "model/many-2"})
    stub.add_response("create_endpoint_config", {"EndpointConfigArn": arn + "endpoint-config/many-2"})
    stub.add_response("update_endpoint", {"EndpointArn": arn + "endpoint/many"}, {
        "EndpointName": "many", "EndpointConfigName": "many-2", "RetainAllVariantProperties": True})
    stub.add_response("describe_endpoint", {
        "EndpointName": "many", "EndpointArn": arn + "endpoint/many", "EndpointConfigName": "many-2",
        "EndpointStatus": "InService", "CreationTime": 0, "LastModifiedTime": 0,
    })
    stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": "many-1"})
    stub.add_response("delete_model", {}, {"ModelName": "many-1"})
    with stub:
        deploy.main(["update", "many", *hosted, "--hub-model", "o/n", "--suffix", "2"], aws)
    stub.assert_no_pending_responses()
print(json.dumps(found))
"""


def test_the_calls_do_what_they_say(client: Client) -> None:
    found = client("moto", SCRIPT, str(DEPLOY.parent), json.dumps(HOSTED), json.dumps(TRAIN), timeout_s=300)
    assert found["status"] == "InService"
    assert found["model"]["ModelDataUrl"] == "s3://b/model.tar.gz"
    assert found["model"]["Environment"] == {"NUM_MAX_POSITIONS": "128"}
    assert found["variants"][0]["ModelName"] == "reviews-1"
    assert found["scaling"] == ["endpoint/reviews/variant/main", 8, "TargetTrackingScaling"]
    assert found["transform"] == "reviews-1"
    assert found["left"] == [0, 0]
    assert found["mode"] == "MultiModel"
    assert found["job"] == [{"lr": "3e-5"}, "Completed", "train"]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(DEPLOY), *arguments], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )


@pytest.mark.parametrize(
    ("arguments", "operations"),
    [
        ([*TRAIN], ["create_training_job"]),
        (
            ["endpoint", "n", *HOSTED, "--hub-model", "o/n", "--serverless-mb", "2048"],
            ["create_model", "create_endpoint_config", "create_endpoint"],
        ),
        (
            ["update", "n", *HOSTED, "--model-data", "s3://b/m.tar.gz"],
            ["describe_endpoint", "create_model", "create_endpoint_config", "update_endpoint"],
        ),
        (["autoscale", "n"], ["register_scalable_target", "put_scaling_policy"]),
        (["delete", "n"], ["describe_endpoint", "delete_endpoint", "delete_endpoint_config", "delete_model"]),
    ],
)
def test_a_dry_run_prints_its_calls_and_needs_no_boto3(arguments: list[str], operations: list[str]) -> None:
    done = run(*arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["operation"] for line in done.stdout.splitlines()] == operations


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["endpoint", "n", *HOSTED], "one of --model-data and --hub-model"),
        ([*TRAIN, "--spot"], "--spot wants --checkpoints"),
        (["multi-model", "n", *HOSTED, "--model-data", "s3://b/m.tar.gz"], "the prefix of the archives"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_call(arguments: list[str], words: str) -> None:
    done = run(*arguments, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_the_readme_has_the_metrics_of_a_training_job() -> None:
    done = run(*TRAIN, "--dry-run")
    algorithm = json.loads(done.stdout)["parameters"]["AlgorithmSpecification"]
    readme = Path(DEPLOY).with_name("README.md").read_text()
    found = re.findall(r"^\| `([\w:]+)` \| `(.+?)` \|$", readme, re.MULTILINE)
    assert {one["Name"]: one["Regex"] for one in algorithm["MetricDefinitions"]} == dict(found)
