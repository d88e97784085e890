"""The only room that knows colour and width: it shows what sessions and plans say, on a terminal or in a pipe."""
