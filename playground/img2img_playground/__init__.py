"""The playground: a web page for trying an img2img server, as a client like any other."""
