"""s3:// URLs: s3fs with the retry policy of `retries`."""

import itertools
from typing import Any

from botocore.exceptions import (
    ClientError,
    ConnectionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from fsspec.asyn import sync_wrapper
from s3fs.core import S3_RETRYABLE_ERRORS, S3FileSystem, _error_wrapper

from spatialvla_jax.utils.retries import count, retrying
from spatialvla_jax.utils.storage import CONCURRENT

_THROTTLED = {"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "ThrottlingException"}
_ENDS_UPLOAD = {"complete_multipart_upload", "abort_multipart_upload"}
_NO_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401"}


class S3Storage(S3FileSystem):
    """Disables the retries of botocore and s3fs, which multiply and are not counted, and the cache of listings, which
    misses what other machines write."""

    def __init__(self, *args: Any, **kwargs: Any):
        settings = {"retries": {"total_max_attempts": 1}, "max_pool_connections": CONCURRENT, "read_timeout": 30}
        super().__init__(*args, **{"use_listings_cache": False, "config_kwargs": settings} | kwargs)

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        await self.set_session()
        call = getattr(await self.get_s3(kwargs.get("Bucket")), method)
        arguments = self._get_s3_method_kwargs(call, *akwarglist, **kwargs)
        tries = itertools.count()

        async def once() -> Any:
            count(requests=1)
            repeated = next(tries) > 0
            try:
                found = await _error_wrapper(call, kwargs=arguments, retries=1)
            except Exception as error:
                if repeated and method in _ENDS_UPLOAD and _answer(error)[0] == "NoSuchUpload":
                    return {}  # an earlier try succeeded, and its response was lost
                raise
            for error in found.get("Errors", ()) if method == "delete_objects" else ():  # s3fs would omit these
                status = {"HTTPStatusCode": 403 if error.get("Code") == "AccessDenied" else 500}
                raise ClientError({"Error": error, "ResponseMetadata": status}, "DeleteObjects")  # pyright: ignore
            return found

        return await retrying(once, transient, f"{method} s3://{kwargs.get('Bucket', '')}/{kwargs.get('Key', '')}")

    call_s3 = sync_wrapper(_call_s3)  # the inherited one would not call this `_call_s3`

    async def _cat_file(
        self, path: str, version_id: str | None = None, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        bucket, key, _ = self.split_path(path)
        limits = {} if start is None and end is None else {"Range": await self._process_limits(path, start, end)}

        async def once() -> bytes:  # the response may be truncated, which `_call_s3` does not notice
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key, **limits)
            async with answer["Body"] as body:
                return await body.read()

        found = await retrying(once, transient, f"get_object s3://{bucket}/{key}")
        count(read=len(found))
        return found

    def size_and_version(self, path: str) -> tuple[int, str]:
        bucket, key, _ = self.split_path(path)
        found: Any = self.call_s3("head_object", Bucket=bucket, Key=key)
        return found["ContentLength"], found["ETag"].strip('"')

    def probe(self, bucket: str) -> None:
        """Raises FileNotFoundError if the bucket does not exist."""
        self.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)

    def probe_write(self, path: str) -> None:
        bucket, key, _ = self.split_path(path)
        upload = self.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        self.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload["UploadId"])

    @staticmethod
    def status_of(error: Exception) -> tuple[int, str]:
        """The HTTP status behind an error, 0 if there is none, and the server's message."""
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return 401, str(error)
        if isinstance(error, ParamValidationError):
            return 400, str(error)
        code, status, message = _answer(error)
        return 401 if code in _NO_CREDENTIALS else status, message


def transient(error: Exception) -> str:
    code, status, message = _answer(error)
    if code:
        again = status in (408, 429) or (status >= 500 and status not in (501, 507))
        return message if again or code in _THROTTLED else ""
    network = isinstance(error, (*S3_RETRYABLE_ERRORS, ConnectionError, TimeoutError))
    return (str(error) or type(error).__name__) if network else ""


def _answer(error: Exception) -> tuple[str, int, str]:
    """Code, HTTP status and message of the server's response; ("", 0, the error's text) without a response."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(cause, ClientError):
        return "", 0, str(error)
    answer: Any = cause.response  # type: ignore
    return str(answer["Error"].get("Code")), answer["ResponseMetadata"].get("HTTPStatusCode", 0), str(cause)
