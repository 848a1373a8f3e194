"""What sandboxes begin with: images of layers, where they come from, and the recipes that make them."""

from upspiral.sandbox.images.builder import BuildMachine, ImageBuilder
from upspiral.sandbox.images.image import Image, ImageContent
from upspiral.sandbox.images.recipe import Recipe, load_recipe
from upspiral.sandbox.images.store import ImageStore, UsedImage

__all__ = ["BuildMachine", "Image", "ImageBuilder", "ImageContent", "ImageStore", "Recipe", "UsedImage", "load_recipe"]
