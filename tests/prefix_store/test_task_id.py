"""Names of tasks as tenants and the store have them."""

from __future__ import annotations

import pytest

from prefix_store.errors import InvalidTaskIdError, InvalidTenantError
from prefix_store.task_id import check_stored_name, name_for, owner_and_name, stored_name
from prefix_store.tenant import check_tenant


@pytest.mark.parametrize(
    ("tenant", "name", "stored"),
    [
        ("default", "e2e", "e2e"),
        ("default", "default/e2e", "e2e"),
        ("default", "acme/e2e", "acme/e2e"),
        ("acme", "e2e", "acme/e2e"),
        ("acme", "acme/e2e", "acme/e2e"),
        ("acme", "default/e2e", "e2e"),
        ("acme", "beta/e2e", "beta/e2e"),
    ],
)
def test_what_the_store_calls_a_task(tenant: str, name: str, stored: str) -> None:
    assert stored_name(tenant, name) == stored
    assert check_stored_name(stored) == stored
    owner, own_name = owner_and_name(stored)
    assert stored_name(owner, own_name) == stored
    assert stored_name(tenant, name_for(tenant, stored)) == stored


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/",
        "/a",
        "a/b/c",
        "acme//e2e",
        "Acme/e2e",
        "public/e2e",
        "a b",
        "é",
        "a\n",
        "../e2e",
    ],
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InvalidTaskIdError):
        stored_name("acme", name)
    with pytest.raises(InvalidTaskIdError):
        check_stored_name(name)


def test_a_task_of_the_default_tenant_has_one_name_in_the_store() -> None:
    with pytest.raises(InvalidTaskIdError):
        check_stored_name("default/e2e")


@pytest.mark.parametrize("tenant", ["", "public", "-a", "A", "a_b", "a/b", "a" * 64, "é", "a\n"])
def test_what_is_no_tenant(tenant: str) -> None:
    with pytest.raises(InvalidTenantError):
        check_tenant(tenant)
