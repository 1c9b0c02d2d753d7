"""build.py's login and repositories in Amazon's registry: against moto, and botocore's Stubber for refusals."""

from platforms.conftest import Client

from tuneserve.settings import PROJECT

SCRIPT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import ecr
from botocore.stub import Stubber
from moto import mock_aws
found = {}
where = {"account": "123456789012", "region": "eu-west-1"}

def fails(call, *arguments):
    try:
        call(*arguments)
    except ecr.RegistryError as error:
        return str(error)

os.environ |= {"AWS_EC2_METADATA_DISABLED": "true"}
found["nobody"] = fails(ecr.Registry(**where).credentials)
os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
with mock_aws():
    registry = ecr.Registry(**where)
    found["login"] = registry.credentials()
    found["made"] = [registry.create("team/tuneserve"), registry.create("team/tuneserve")]
    found["repositories"] = [
        one["repositoryUri"] for one in registry._client.describe_repositories()["repositories"]
    ]
    with Stubber(registry._client) as stub:
        stub.add_client_error("describe_repositories", "RepositoryNotFoundException")
        stub.add_client_error("create_repository", "RepositoryAlreadyExistsException")
        found["raced"] = registry.create("one")
        stub.add_client_error("describe_repositories", "RepositoryNotFoundException")
        stub.add_client_error("create_repository", "AccessDeniedException", "not for you")
        found["denied"] = [fails(registry.create, "one")]
        stub.add_client_error("describe_repositories", "AccessDeniedException", "not for you")
        found["denied"] += [fails(registry.create, "one")]
        stub.add_client_error("get_authorization_token", "ExpiredTokenException", "too old")
        found["denied"] += [fails(registry.credentials)]
sys.modules["boto3"] = None
found["bare"] = fails(lambda: ecr.Registry(**where))
print(json.dumps(found))
"""


def test_a_login_is_found_and_a_repository_made(client: Client) -> None:
    found = client("moto", SCRIPT, str(PROJECT / "production"))
    assert found.pop("login") == ["AWS", "123456789012-auth-token"]
    assert found.pop("made") == [True, False]
    assert found.pop("repositories") == ["123456789012.dkr.ecr.eu-west-1.amazonaws.com/team/tuneserve"]
    assert found.pop("raced") is False
    assert "Unable to locate credentials" in found.pop("nobody")
    created, described, asked = found.pop("denied")
    assert "not for you" in created and "not for you" in described and "too old" in asked  # noqa: PT018
    assert found == {"bare": "a registry of Amazon needs boto3: pip install boto3"}
