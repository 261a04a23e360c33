"""The address of a store in a bucket, as people give it. Nothing here asks a service, and no address holds credentials."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

from knowledge_store.errors import InputError

SCHEMES = {"s3": "Amazon S3", "gs": "Google Cloud Storage", "az": "Azure Blob Storage"}
ENDPOINTS = {  # where the environment says so, first what is for the one service alone
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (of a profile: `aws configure export-credentials --format env`)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (the path of a key file)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


@dataclass(frozen=True)
class BucketAddress:
    """Where a store in a bucket is: `s3://bucket/prefix`, with `?endpoint=URL` where the service has an address of its own.

    Attributes:
        scheme: of SCHEMES.
        bucket: its name (of a container, on Azure).
        prefix: what all names begin with, without "/" at either end; empty where the store is the whole bucket.
        endpoint: URL of the service; None for what the environment says, or else the provider's own.
    """

    scheme: str
    bucket: str
    prefix: str
    endpoint: str | None = None

    @classmethod
    def parse(cls, text: str) -> BucketAddress:
        """The address that a text is.

        Raises:
            InputError: it is none.
        """
        shown, query = text.partition("?")[::2]  # behind the ? of a signed URL is its signature
        if re.search(r"//[^/?]*@", unquote(text)):
            raise InputError(
                "an address of a bucket holds no credentials: set"
                f" {CREDENTIALS.get(text.partition(':')[0].lower(), 'them')} in the environment"
            )
        parts = _split(shown)
        if parts is None or parts.scheme not in SCHEMES or not parts.netloc:
            raise InputError(
                f"{shown} is no address of a store: give a folder, s3://BUCKET/PREFIX (also gs:// and az://), or grpc+tls://HOST:PORT"
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", parts.netloc):
            raise InputError(f"{shown} is no address of a store: the name of a bucket has letters, digits, '.', '_' and '-'")
        prefix = parts.path.strip("/")
        if parts.fragment or re.search(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f%\\]", prefix or "prefix"):
            raise InputError(f"{shown} is no address of a store: what follows the bucket is names with one / between them")
        options = parse_qs(query, keep_blank_values=True)
        if options.keys() - {"endpoint"} or len(options.get("endpoint", [])) > 1:
            raise InputError(f"{shown}?… is no address of a store: after the ? stands endpoint=URL and nothing else")
        address = cls(parts.scheme, parts.netloc, prefix)
        return address.at(options["endpoint"][0]) if options else address

    def at(self, endpoint: str) -> BucketAddress:
        """The same with this endpoint, unless it has one.

        Raises:
            InputError: it is no URL of a service.
        """
        return self if self.endpoint else replace(self, endpoint=_endpoint(endpoint))

    @property
    def service(self) -> str | None:
        """URL of the service, also where the environment says it; None for the provider's own.

        Raises:
            InputError: what the environment says is no URL of a service.
        """
        named = (name for name in ENDPOINTS[self.scheme] if os.environ.get(name))
        return self.endpoint or next((_endpoint(os.environ[name], f"{name} in the environment") for name in named), None)

    @property
    def plain(self) -> str:
        """Without the endpoint."""
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    def __str__(self) -> str:
        return self.plain + (f"?endpoint={quote(self.endpoint, safe=':/')}" if self.endpoint else "")


def is_bucket_address(text: str) -> bool:
    """Whether a text is meant for the address of a bucket."""
    return text.partition("://")[0].lower() in SCHEMES and "://" in text


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None where it is none."""
    try:
        parts = urlsplit(url)
        return parts if parts.port != 0 and not re.search(r"\s", parts.netloc) else None
    except ValueError:
        return None


def _endpoint(url: str, origin: str = "an endpoint") -> str:
    """The URL of a service, without "/" at its end (InputError: it is none; says where it comes from)."""
    if "@" in url:
        raise InputError(f"{origin} holds no credentials: set them in variables of their own")
    parts = _split(url)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        shown = repr(re.sub(r"\?.*", "?…", url, flags=re.DOTALL))
        subject = shown if origin == "an endpoint" else f"{origin}, {shown},"
        raise InputError(f"{subject} is no endpoint: give the URL of the service, such as https://minio.example.org:9000")
    return url.rstrip("/")
