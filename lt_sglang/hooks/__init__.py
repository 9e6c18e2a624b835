"""The only places where SGLang's own code is changed, in one table."""
