"""Generation over HTTP, in OpenAI's form; requests that arrive together share forwards."""
