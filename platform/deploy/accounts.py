"""Accounts of a team's MLflow server and what they may do.

    docker compose run --rm accounts add anna --role editor
    docker compose run --rm accounts list

| role | may |
|---|---|
| reader | see everything, and make experiments and models of its own (MLflow lets everybody do that) |
| editor | write to every experiment and model of everybody, move aliases, remove model versions |
| admin | all of that, delete experiments, and manage accounts |

Workers are editors: they write to experiments that people have made, and remove what a crash has left twice.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys

from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient
from mlflow.server.auth.entities import Role

# MLflow's resources and how far an editor goes; where it removes something it must be MANAGE.
EDITOR = {
    "experiment": "EDIT",
    "run": "EDIT",
    "logged_model": "MANAGE",
    "registered_model": "EDIT",
    "registered_model_version": "MANAGE",
}
ROLES = ("reader", "editor", "admin")
WORKER = "worker"
# Without workspaces, rights lie in this one.
WORKSPACE = "default"


def prepare(client: AuthServiceClient) -> None:
    """Make the role and the workers' account; their password is set to the environment's each time."""
    editor = _editor(client)
    held = {grant.resource_type: grant for grant in client.list_role_permissions(editor.id)}
    for resource, permission in EDITOR.items():
        if resource not in held:
            client.add_role_permission(editor.id, resource, "*", permission)
        elif held[resource].permission != permission:
            client.update_role_permission(held[resource].id, permission)
    password = os.environ["MLFLOW_WORKER_PASSWORD"]
    if _exists(client, WORKER):
        client.update_user_password(WORKER, password)
    else:
        client.create_user(WORKER, password)
    set_role(client, WORKER, "editor")


def add(client: AuthServiceClient, name: str, role: str) -> None:
    """Make an account and print its password."""
    if _exists(client, name):
        sys.exit(f"there is an account {name!r} already: `accounts role` and `accounts password` change it")
    password = secrets.token_urlsafe(18)
    client.create_user(name, password)
    set_role(client, name, role)
    print(password)


def set_role(client: AuthServiceClient, name: str, role: str) -> None:
    """Give an account one of the three roles in place of the one that it has."""
    client.update_user_admin(name, role == "admin")
    editor = _editor(client)
    has = any(held.id == editor.id for held in client.list_user_roles(name))
    if role == "editor" and not has:
        client.assign_role(name, editor.id)
    if role != "editor" and has:
        client.unassign_role(name, editor.id)


def change_password(client: AuthServiceClient, name: str) -> None:
    """Give an account a new password and print it."""
    password = secrets.token_urlsafe(18)
    client.update_user_password(name, password)
    print(password)


def show(client: AuthServiceClient) -> None:
    """Print all accounts with their roles."""
    editors = {assignment.user_id for assignment in client.list_role_users(_editor(client).id)}
    for user in client._request("/api/2.0/mlflow/users/list", "GET")["users"]:
        role = "admin" if user["is_admin"] else "editor" if user["id"] in editors else "reader"
        print(f"{user['username']}\t{role}")


def _editor(client: AuthServiceClient) -> Role:
    for role in client.list_roles(WORKSPACE):
        if role.name == "editor":
            return role
    return client.create_role(WORKSPACE, "editor", "writes to all experiments and models")


def _exists(client: AuthServiceClient, name: str) -> bool:
    try:
        client.get_user(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="accounts", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="make the roles and the workers' account")
    commands.add_parser("list", help="show accounts and roles")
    for command, summary in {
        "add": "make an account and print its password",
        "role": "change what an account may do",
        "password": "set a new password and print it",
        "remove": "remove an account",
    }.items():
        one = commands.add_parser(command, help=summary)
        one.add_argument("name")
        if command in ("add", "role"):
            one.add_argument("--role", choices=ROLES, required=True)
    given = parser.parse_args()
    client = AuthServiceClient(os.environ["MLFLOW_TRACKING_URI"])
    if given.command == "prepare":
        prepare(client)
    elif given.command == "add":
        add(client, given.name, given.role)
    elif given.command == "role":
        set_role(client, given.name, given.role)
    elif given.command == "password":
        change_password(client, given.name)
    elif given.command == "remove":
        client.delete_user(given.name)
    else:
        show(client)


if __name__ == "__main__":
    main()
