"""From a forest batch to an optimizer step."""
