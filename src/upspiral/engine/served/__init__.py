"""An engine of one process for another: tokens over a socket, so that engines can be placed on other machines."""
