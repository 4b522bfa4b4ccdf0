"""Manages the accounts of a team's MLflow server and their roles.

    docker compose run --rm accounts add anna --role editor
    docker compose run --rm accounts list

| role | permissions |
|---|---|
| reader | read everything, create own experiments and models (MLflow allows that to every account) |
| editor | write to all experiments and models, move aliases, remove model versions |
| admin | everything, including deleting experiments and managing accounts |

Workers are editors: they write to other accounts' experiments, and remove duplicates after a crash.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys

from mlflow.exceptions import MlflowException
from mlflow.server.auth.client import AuthServiceClient
from mlflow.server.auth.entities import Role

# An editor's permission by MLflow resource; removing needs MANAGE.
EDITOR = {
    "experiment": "EDIT",
    "run": "EDIT",
    "logged_model": "MANAGE",
    "registered_model": "EDIT",
    "registered_model_version": "MANAGE",
}
ROLES = ("reader", "editor", "admin")
WORKER = "worker"
WORKSPACE = "default"


def prepare(client: AuthServiceClient) -> None:
    """Create the editor role and the workers' account, and set its password from the environment."""
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
    """Create an account and print its password."""
    if _exists(client, name):
        sys.exit(f"the account {name!r} exists: change it with `accounts role` or `accounts password`")
    password = secrets.token_urlsafe(18)
    client.create_user(name, password)
    set_role(client, name, role)
    print(password)


def set_role(client: AuthServiceClient, name: str, role: str) -> None:
    """Change the role of an account."""
    client.update_user_admin(name, role == "admin")
    editor = _editor(client)
    is_editor = any(held.id == editor.id for held in client.list_user_roles(name))
    if role == "editor" and not is_editor:
        client.assign_role(name, editor.id)
    if role != "editor" and is_editor:
        client.unassign_role(name, editor.id)


def change_password(client: AuthServiceClient, name: str) -> None:
    """Set a new random password and print it."""
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
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="accounts", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="create the roles and the workers' account")
    commands.add_parser("list", help="show accounts and roles")
    for command, summary in {
        "add": "create an account and print its password",
        "role": "change the role of an account",
        "password": "set a new password and print it",
        "remove": "remove an account",
    }.items():
        subparser = commands.add_parser(command, help=summary)
        subparser.add_argument("name")
        if command in ("add", "role"):
            subparser.add_argument("--role", choices=ROLES, required=True)
    arguments = parser.parse_args()
    client = AuthServiceClient(os.environ["MLFLOW_TRACKING_URI"])
    if arguments.command == "prepare":
        prepare(client)
    elif arguments.command == "add":
        add(client, arguments.name, arguments.role)
    elif arguments.command == "role":
        set_role(client, arguments.name, arguments.role)
    elif arguments.command == "password":
        change_password(client, arguments.name)
    elif arguments.command == "remove":
        client.delete_user(arguments.name)
    else:
        show(client)


if __name__ == "__main__":
    main()
