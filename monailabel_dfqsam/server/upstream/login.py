"""MONAI Label's logins, put right: tokens, roles, and what is said when the login service refuses.

Tokens are decoded upstream without naming algorithms, which PyJWT refuses; an administrator is no user there;
a token without roles, and a wrong password, end as faults of the server.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jwt
import requests
from fastapi import Depends
from monailabel.config import RBAC_ADMIN as FOR_ADMINS
from monailabel.config import RBAC_USER as FOR_USERS
from monailabel.config import settings as upstream
from monailabel.endpoints.user import auth

from monailabel_dfqsam.server.upstream.threads import off_loop

# Asymmetric ones alone: the realm's key is public, and must not do as an HMAC secret.
_TOKEN_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"]

__all__ = ["FOR_ADMINS", "FOR_USERS", "admin", "is_known", "login_failure", "repair_tokens", "user"]


def user() -> list[Any]:
    """The dependencies of a route for whoever is logged in."""
    return [Depends(off_loop(auth.RBAC(upstream.MONAI_LABEL_AUTH_ROLE_USER)))]


def admin() -> list[Any]:
    """The dependencies of a route for administrators."""
    return [Depends(off_loop(auth.RBAC(upstream.MONAI_LABEL_AUTH_ROLE_ADMIN)))]


def repair_tokens() -> None:
    """Has tokens decoded safely, and each role include the lesser ones."""
    roles = (
        upstream.MONAI_LABEL_AUTH_ROLE_ADMIN,
        upstream.MONAI_LABEL_AUTH_ROLE_REVIEWER,
        upstream.MONAI_LABEL_AUTH_ROLE_ANNOTATOR,
        upstream.MONAI_LABEL_AUTH_ROLE_USER,
    )
    from_token = auth.from_token

    @functools.wraps(from_token)
    def with_lesser_roles(token: str) -> Any:
        try:
            user = from_token(token)
        except (AttributeError, TypeError, ValueError):  # claims that are missing or of another type
            raise jwt.InvalidTokenError(
                "the token does not say who it is for, and which roles they have"
            ) from None
        highest = min((roles.index(role) for role in user.roles if role in roles), default=len(roles))
        user.roles = sorted({*user.roles, *roles[highest:]})
        return user

    auth.from_token = with_lesser_roles
    auth.jwt = SimpleNamespace(decode=functools.partial(jwt.decode, algorithms=_TOKEN_ALGORITHMS))


def is_known(authorization: str) -> bool:
    """Whether an Authorization header lets its sender in; anyone where there are no logins."""
    if not upstream.MONAI_LABEL_AUTH_ENABLE:
        return True
    scheme, _, token = authorization.partition(" ")
    try:
        auth.from_token(token)
    except jwt.InvalidTokenError:
        return False
    return scheme.lower() == "bearer"


def login_failure(error: requests.RequestException) -> tuple[int, str] | None:
    """Status and sentence when it was the login service that failed or refused, else None."""
    url = str(error.request.url) if error.request is not None else ""
    if not upstream.MONAI_LABEL_AUTH_ENABLE or not url.startswith(upstream.MONAI_LABEL_AUTH_REALM_URI):
        return None
    if error.response is not None and error.response.status_code in (400, 401, 403):
        return 401, "the login service does not take this name and password"
    return 502, f"the login service does not answer ({type(error).__name__})"
