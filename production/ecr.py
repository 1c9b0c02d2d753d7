"""Amazon's registries (ECR), for build.py: a login by the standard credential chain, and missing repositories."""

import base64
from typing import Any


class RegistryError(Exception):
    """There is no boto3, there are no credentials, or they do not suffice; the message has AWS's words."""


class Registry:
    """The registry of an account in a region.

    Raises:
        RegistryError: by each method too.
    """

    def __init__(self, *, account: str, region: str) -> None:
        try:
            import boto3
            import botocore.exceptions
        except ModuleNotFoundError:
            raise RegistryError("a registry of Amazon needs boto3: pip install boto3") from None
        self._account = account
        self._errors = botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError
        try:
            self._client = boto3.client("ecr", region_name=region)
        except self._errors as error:
            raise RegistryError(str(error)) from error

    def credentials(self) -> tuple[str, str]:
        """User and password for the engine, which are good for twelve hours."""
        found = self._ask("get_authorization_token", registryIds=[self._account])
        token = found["authorizationData"][0]["authorizationToken"]
        user, _, password = base64.b64decode(token).decode().partition(":")
        return user, password

    def create(self, name: str) -> bool:
        """Make a repository unless it is there; whether it was made."""
        try:
            self._client.describe_repositories(registryId=self._account, repositoryNames=[name])
        except self._client.exceptions.RepositoryNotFoundException:
            try:
                self._client.create_repository(registryId=self._account, repositoryName=name)
            except self._client.exceptions.RepositoryAlreadyExistsException:  # by somebody else, just now
                return False
            except self._errors as error:
                raise RegistryError(str(error)) from error
            return True
        except self._errors as error:
            raise RegistryError(str(error)) from error
        return False

    def _ask(self, operation: str, **arguments: Any) -> Any:
        try:
            return getattr(self._client, operation)(**arguments)
        except self._errors as error:
            raise RegistryError(str(error)) from error
