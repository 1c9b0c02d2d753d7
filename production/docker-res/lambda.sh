#!/bin/sh
# What the image of a serverless function starts: the runtime's client or, where there is no Lambda, that in its emulator.
# Source: "Deploy Python Lambda functions with container images", with an alternative base image.
cd "$(dirname "$0")" || exit
set -- "${PYTHON:-/opt/venv/bin/python}" -m awslambdaric "${1:-function.handler}"
# Its options may stand in the variable, so it is not quoted.
[ -n "$AWS_LAMBDA_RUNTIME_API" ] || set -- ${LAMBDA_EMULATOR:-/usr/local/bin/aws-lambda-rie} "$@"
exec "$@"
