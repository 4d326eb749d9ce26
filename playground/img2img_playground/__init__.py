"""The playground: a page in the browser over an img2img server, whose client it is like any other."""
