"""Makes `twistd mqtts-gateway` known.  Imports nothing of the gateway: twistd loads every plugin it lists."""

from twisted.application.service import ServiceMaker

mqtts_gateway = ServiceMaker(
    "MQTTS gateway",
    "gateway.tap",
    "Give every plain-MQTT device a verified TLS connection of its own to the broker.",
    "mqtts-gateway",
)
