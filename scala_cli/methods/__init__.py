"""Training methods, by the name a user gives."""

from scala_cli.methods.base import Method
from scala_cli.methods.scala import Scala
from scala_cli.methods.separate import Separate
from scala_cli.methods.usnet import USNet

METHODS: dict[str, type[Method]] = {"scala": Scala, "usnet": USNet, "separate": Separate}
