"""Files of any bytes, by the hundred thousand: each is a result or one line of error, soon and with little memory."""
