"""Sandboxes in containers of Docker or Podman, with the agent inside as their first process."""

from upspiral.sandbox.container.backend import ContainerBackend, DockerBackend, PodmanBackend

__all__ = ["ContainerBackend", "DockerBackend", "PodmanBackend"]
