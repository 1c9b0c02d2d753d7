"""The platforms that start verbs in their own way; PLATFORM names one."""

from collections.abc import Mapping

from tuneserve.adapters.start import Start


def start_of(verb: str, environ: Mapping[str, str]) -> Start:
    """The start of a verb: another than usual for the platform's own verbs, but not in their child processes."""
    if environ.get("PLATFORM", "").strip() != "sagemaker" or "TORCHELASTIC_RUN_ID" in environ:
        return Start()
    if verb == "train":
        from tuneserve.adapters.sagemaker_training import Training

        return Training(environ)
    if verb == "serve":
        from tuneserve.adapters.sagemaker_serving import Serving

        return Serving(environ)
    return Start()
