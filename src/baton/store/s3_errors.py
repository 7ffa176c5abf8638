"""What an S3 server's refusals mean for the person whose bucket it is."""

from __future__ import annotations

from typing import Any

from baton.errors import StoreBusy, StoreError, StoreRefused

# Codes of the server -> what they mean and what to do. They are refused for good.
_REFUSED = {
    "NoSuchBucket": "there is no such bucket there; create it, or check its name and"
    " AWS_ENDPOINT_URL",
    "InvalidBucketName": "this is no name of a bucket",
    "AccessDenied": "these credentials may not do that; a store needs s3:ListBucket, GetObject,"
    " PutObject, DeleteObject and AbortMultipartUpload",
    "AllAccessDisabled": "the bucket is locked",
    "InvalidAccessKeyId": "the server does not know this access key; check AWS_ACCESS_KEY_ID or"
    " AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret key is not the access key's; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; renew them (e.g. `aws sso login`) and submit"
    " again",
    "InvalidToken": "the session token is not valid; check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
    "IllegalLocationConstraintException": "the bucket is in another region; set AWS_REGION",
}
_EXPIRED = ("ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
# HEAD has no body, so these come without a code.
_BARE = {"403": "AccessDenied", "301": "PermanentRedirect"}
# Names of botocore's own exceptions; their messages name modules, not what to do.
_HERE = {
    "NoCredentialsError": "there are no credentials; set AWS_ACCESS_KEY_ID and"
    " AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": "the credentials are incomplete; set both AWS_ACCESS_KEY_ID and"
    " AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "there is no such profile in ~/.aws; check AWS_PROFILE",
    "TokenRetrievalError": "the login has expired; run `aws sso login`",
    "UnauthorizedSSOTokenError": "the login has expired; run `aws sso login`",
    "SSOTokenLoadError": "there is no login; run `aws sso login`",
    "InvalidEndpointDiscoveryConfigurationError": "AWS_ENDPOINT_URL is not a URL",
    "ParamValidationError": "this is no name of a bucket",
}
# Some servers say it with a status that is not 503.
_BUSY = ("SlowDown", "Throttling", "RequestTimeout", "InternalError", "ServiceUnavailable")
_SILENT = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyConnectionError",
)


def code_of(error: Exception) -> str:
    """The server's error code, or a bare HTTP status, or the name of the exception."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    found = str(response.get("Error", {}).get("Code", "")) or type(error).__name__
    return "ExpiredToken" if found in _EXPIRED else _BARE.get(found, found)


def is_missing(error: Exception) -> bool:
    return code_of(error) in ("404", "NoSuchKey", "NotFound")


def is_refused_condition(error: Exception) -> bool:
    """Did a condition not hold, or did another write under one win this very moment?"""
    return code_of(error) in ("412", "PreconditionFailed", "ConditionalRequestConflict")


def explain(error: Exception, *, bucket: str, endpoint: str, doing: str) -> StoreError:
    """An error of ours that says where, what and what to do."""
    where = f"s3://{bucket}" + (f" at {endpoint}" if endpoint else "")
    code = code_of(error)
    if code in _REFUSED:
        return StoreRefused(f"{where}: {doing}: {_REFUSED[code]} ({code})")
    if code in _HERE:
        return StoreRefused(f"{where}: {_HERE[code]}")
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return StoreRefused(f"{where}: {error}; check AWS_ENDPOINT_URL")
    if code in _SILENT:
        return StoreBusy(
            f"{where}: {doing}: the server does not answer ({code}); check AWS_ENDPOINT_URL and"
            " the network"
        )
    kind = StoreBusy if _may_pass(error) else StoreError
    return kind(f"{where}: {doing}: {str(error).splitlines()[0] if str(error) else code}")


def _may_pass(error: Exception) -> bool:
    """Is it the server's trouble, or that of the way to it? A request that is wrong stays so."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code_of(error) in _BUSY or status in (408, 429):
        return True
    # 501: the server does not know this kind of request.
    return status not in range(400, 500) and status != 501
