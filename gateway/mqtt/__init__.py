"""The MQTT codec: bytes in, packets and errors out; no sockets, no clock, no Twisted.

In: the bytes of one direction of a network connection, cut anywhere.
Out: whole packets (`reader`, for CONNECT, CONNACK and AUTH), or the same bytes once their fixed headers have been
checked (`framer`, for everything that is relayed); `PacketError` where the peer broke the rules of its version of MQTT.
"""
