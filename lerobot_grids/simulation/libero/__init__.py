"""LIBERO with objects that are dealt anew, a scripted expert that demonstrates, and cheaper drawing."""
