"""SageMaker's multi-model endpoint: boto3 asks the platform's side, which loads and unloads models in our server."""

import ast
import json
import tarfile
from collections import Counter
from pathlib import Path

import torch
from platforms.conftest import Client
from platforms.sagemaker_endpoint import Endpoint, served
from processes.test_archived_models import BERT, GPT, embed, go_on, pack, weights
from processes.test_server import Start, environment, start

__all__ = ["environment", "start", "weights"]

CLIENT = """
import json, sys, threading, time
import boto3
from botocore.config import Config

url, asked = sys.argv[1], json.loads(sys.argv[2])
answers, errors, waits, lock = [], [], [0], threading.Lock()

def ask(number):
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "eu-central-1"}
    config = Config(retries={"total_max_attempts": 1}, read_timeout=300)
    runtime = boto3.session.Session().client("sagemaker-runtime", endpoint_url=url, config=config, **keys)
    for target, body in asked:
        while True:
            try:
                found = runtime.invoke_endpoint(
                    EndpointName="endpoint", TargetModel=target, Body=body.encode(), ContentType="text/csv"
                )
                with lock:
                    answers.append([target, found["Body"].read().decode(), found["InvokedProductionVariant"]])
            except runtime.exceptions.ModelNotReadyException as error:
                assert error.response["ResponseMetadata"]["HTTPStatusCode"] == 429
                with lock:
                    waits[0] += 1
                time.sleep(0.2)
                continue
            except runtime.exceptions.ModelError as error:
                with lock:
                    errors.append([target, error.response["OriginalStatusCode"], error.response["OriginalMessage"]])
            except runtime.exceptions.ClientError as error:
                with lock:
                    errors.append([target, error.response["Error"]["Code"], error.response["Error"]["Message"]])
            break

threads = [threading.Thread(target=ask, args=[number]) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps({"answers": answers, "errors": errors, "waits": waits[0]}))
"""
RAISES = "def transform_fn(model, data, content_type, accept): raise KeyError(data)\ndef model_fn(folder): return 1\n"
LIMIT = "650M"
"""A process with torch takes 400 MB, and the server 80."""
TEXTS = {"bertmodel.tar.gz": "the film was good", "gptmodel.tar.gz": '"the film was"'}


def test_two_archives_that_do_not_fit_together_answer_eight_clients(
    client: Client, start: Start, environment: dict[str, str], weights: dict[str, Path], tmp_path: Path
) -> None:
    archives, base = tmp_path / "prefix", tmp_path / "ml"
    archives.mkdir()
    pack(archives / "bertmodel.tar.gz", weights["bert"], BERT, "bert")
    pack(archives / "gptmodel.tar.gz", weights["gpt"], GPT, "gpt")
    (tmp_path / "inference.py").write_text(RAISES)
    with tarfile.open(archives / "raises.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "inference.py", "code/inference.py")
    environment |= {"MEMORY_LIMIT": LIMIT, "DATA_PATH": str(tmp_path / "data"), "HF_HUB_OFFLINE": "1"}
    environment |= {"SAGEMAKER_PROGRAM": "inference.py", "SAGEMAKER_BASE_DIR": str(base)}
    server = start(environment, "run.py", "multimodel")
    server.wait_for(200, "/ping")
    endpoint = Endpoint(server.url, archives, base)
    bodies = [("raises.tar.gz", "a"), ("none.tar.gz", "a"), *(one for one in TEXTS.items() for _ in range(2))]
    with served(endpoint) as url:
        found = client("boto3", CLIENT, url, json.dumps(bodies), timeout_s=500)

    bert, gpt = (
        [answer for target, answer, variant in found["answers"] if target == name and variant == "primary"]
        for name in TEXTS
    )
    assert (len(bert), len(gpt)) == (16, 16), found["errors"]
    for answer in set(bert):
        expected = torch.tensor(embed(weights["bert"], TEXTS["bertmodel.tar.gz"]))
        torch.testing.assert_close(torch.tensor(ast.literal_eval(answer)), expected)
    assert set(gpt) == {go_on(weights["gpt"], TEXTS["gptmodel.tar.gz"])}
    errors = {target: (code, message) for target, code, message in found["errors"]}
    assert Counter(target for target, *_ in found["errors"]) == {"raises.tar.gz": 8, "none.tar.gz": 8}
    assert errors["none.tar.gz"][0] == "ValidationError"
    assert errors["raises.tar.gz"][0] == 400
    assert json.loads(errors["raises.tar.gz"][1]) == {"code": 400, "type": "KeyError", "message": "'a'"}
    assert found["waits"] > 0

    told = Counter(f"{what} {words}" for what, words in endpoint.events)
    assert min(told["load bertmodel.tar.gz 200"], told["load gptmodel.tar.gz 200"]) >= 1
    assert told["load gptmodel.tar.gz 507"] + told["load bertmodel.tar.gz 507"] >= 1, told
    assert sum(count for words, count in told.items() if words.startswith("unload")) >= 1
    assert all(path.name == "model" for path in base.glob("models/*/*"))
    assert server.end()[0] == 0
