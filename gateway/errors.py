"""Why sessions end, in fixed words, and the exceptions that carry those words.

In: nothing.  Out: `EndReason`, the vocabulary that logs, metrics and documents share, and the exceptions of all floors.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class EndReason(StrEnum):
    """Why a session ended: a fixed word, what it means, and what a person can do about it.

    The value is the word that appears in records (`"tls-expired"`); `meaning` and `remedy` are for people.
    """

    meaning: str
    remedy: str

    def __new__(cls, word: str, meaning: str, remedy: str) -> Self:
        """Make the word the value, so that members compare equal to it and print as it."""
        member = str.__new__(cls, word)
        member._value_ = word
        member.meaning = meaning
        member.remedy = remedy
        return member

    # The ordinary ends.
    DEVICE_DISCONNECT = (
        "device-disconnect",
        "The device sent DISCONNECT.",
        "Nothing: sessions should end so.",
    )
    DEVICE_LOST = (
        "device-lost",
        "The device closed or reset its connection without DISCONNECT.",
        "Look at the device's power and network; the broker has published its Will.",
    )
    KEEPALIVE_TIMEOUT = (
        "keepalive-timeout",
        "Nothing came from the device for one and a half times its Keep Alive.",
        "Look at the device's power and network; a longer Keep Alive helps on a bad link.",
    )
    UPSTREAM_DISCONNECT = (
        "upstream-disconnect",
        "The broker ended the session with a DISCONNECT of its own.",
        "Look up the reason code in the record; often another client took over the Client Identifier.",
    )
    UPSTREAM_LOST = (
        "upstream-lost",
        "The broker's side of the connection went away while the session stood.",
        "Look at the broker's log at this time: a restart, a takeover of the Client Identifier, or the network.",
    )
    GATEWAY_STOPPING = ("gateway-stopping", "The gateway was told to stop.", "Nothing: the device will connect again.")

    # What the device did wrong.
    CONNECT_TIMEOUT = (
        "connect-timeout",
        "The device connected and did not send a whole CONNECT in time.",
        "Check that an MQTT client, not a port scanner or a health check, connects to this port.",
    )
    NOT_MQTT = (
        "not-mqtt",
        "The first bytes were no MQTT CONNECT.",
        "Check what speaks to this port: plain MQTT, no TLS, HTTP or WebSocket; a PROXY header needs listen.proxies.",
    )
    MALFORMED_PACKET = (
        "malformed-packet",
        "The device sent bytes that no version of MQTT allows.",
        "Update the device's firmware, or report the detail in the record to its maker.",
    )
    PROTOCOL_ERROR = (
        "protocol-error",
        "The device sent a packet that is not allowed at this point.",
        "Update the device's firmware, or report the detail in the record to its maker.",
    )
    PACKET_TOO_LARGE = (
        "packet-too-large",
        "A packet was above the configured maximum size.",
        "Raise limits.max_packet_size, or max_packet_size of its rule; for a CONNECT, limits.max_connect_size.",
    )
    UNSUPPORTED_PROTOCOL_VERSION = (
        "unsupported-protocol-version",
        "The device asked for a protocol level other than 3 (MQTT 3.1), 4 (3.1.1) and 5 (5.0).",
        "Set the device to MQTT 3.1.1.",
    )

    # Whom the gateway does not let in.
    NETWORK_NOT_ALLOWED = (
        "network-not-allowed",
        "The device's address is in none of the allowed networks.",
        "Add its network to admission.allow, if it is one of yours.",
    )
    TOO_MANY_SESSIONS = (
        "too-many-sessions",
        "The gateway carries as many sessions as it may.",
        "Raise admission.max_sessions and the service's descriptor limit (LimitNOFILE).",
    )
    TOO_MANY_FROM_ADDRESS = (
        "too-many-from-address",
        "This address has as many sessions as one address may have.",
        "Raise admission.max_sessions_per_address, or find out why it opens so many.",
    )
    RATE_LIMITED = (
        "rate-limited",
        "This address opens new sessions faster than it may.",
        "Raise admission.new_sessions_per_second, or find out why the device reconnects so often.",
    )
    TOO_MANY_NEW_SESSIONS = (
        "too-many-new-sessions",
        "More devices came at once than the gateway leads to the broker in the time that one may wait.",
        "Nothing if it passes: they come again. If not, raise pacing.new_sessions_per_second to what the broker bears.",
    )
    PROXY_NOT_TRUSTED = (
        "proxy-not-trusted",
        "A connection to a listener for load balancers came from none of them.",
        "Add its address to listen.proxies if it is a load balancer of yours; devices connect through one.",
    )
    NO_PROXY_HEADER = (
        "no-proxy-header",
        "A load balancer's connection did not begin with a whole and valid PROXY protocol header.",
        "Let the load balancer send it (HAProxy: send-proxy-v2, nginx: proxy_protocol on), or take listen.proxies out.",
    )

    # What the rules for devices do not permit.
    DEVICE_UNKNOWN = (
        "device-unknown",
        "No rule is for this device, and unknown devices are refused.",
        "Add a [[device]] for its Client Identifier, if it is one of yours.",
    )
    DEVICE_PASSWORD_WRONG = (
        "device-password-wrong",
        "The user name or the password in CONNECT is not what the device's rule asks for.",
        "Set the device's password, or make a new hash for lan_password of its rule.",
    )
    DEVICE_NAME_UNUSABLE = (
        "device-name-unusable",
        "A name from the device is missing, too long, or has characters that templates do not allow.",
        "Give the device a name of letters, digits and . _ : @ -, or write its rule without that placeholder.",
    )
    SPOOFED = (
        "spoofed",
        "A Client Identifier came from an address that it is not bound to.",
        "Find out what has this address; if the device has moved, change bound_to of its rule.",
    )
    CLIENT_ID_IN_USE = (
        "client-id-in-use",
        "A session with this Client Identifier stands, from another address.",
        'Give each device a Client Identifier of its own, or set devices.same_client_id = "take-over".',
    )
    CLIENT_ID_PACED = (
        "client-id-paced",
        "This Client Identifier connects more often than it may.",
        "Look for two devices with the same Client Identifier, or find out why the device reconnects so often.",
    )
    TAKEN_OVER = (
        "taken-over",
        "A new session with the same Client Identifier took the place of this one.",
        "Nothing if the device reconnected; otherwise look for two devices with the same Client Identifier.",
    )
    RULE_REFUSED = (
        "rule-refused",
        "The device did what its rule does not permit.",
        "The detail names the key of the rule: correct the device, or the rule.",
    )
    CREDENTIALS_UNAVAILABLE = (
        "credentials-unavailable",
        "The password or token for the broker could not be had.",
        "The detail names the source: the file, the credential, the command or the key of the device's rule.",
    )
    CONNECT_NOT_REWRITABLE = (
        "connect-not-rewritable",
        "What the device's rule asks for cannot be said in a CONNECT.",
        "The detail names the cause: a field that is too long, or a password without a user name.",
    )
    TOKEN_EXPIRING = (
        "token-expiring",
        "The token that the session was opened with is about to expire.",
        "Nothing: the device connects again, with a new token.",
    )

    # Why there is no upstream: on the way.
    DNS_FAILED = (
        "dns-failed",
        "The broker's name could not be resolved.",
        "Check the spelling of the upstream host and the name servers of this machine.",
    )
    TCP_REFUSED = (
        "tcp-refused",
        "The broker's address refused the connection.",
        "Check the port (8883 is usual for MQTT over TLS) and that the broker runs.",
    )
    TCP_TIMEOUT = (
        "tcp-timeout",
        "The broker's address did not answer in time.",
        "Check the firewall between here and the broker, and the port.",
    )
    TCP_UNREACHABLE = (
        "tcp-unreachable",
        "There is no way to the broker's address.",
        "Check this machine's network, its default route and the address.",
    )

    # Why there is no upstream: the TLS handshake.
    TLS_NOT_TLS = (
        "tls-not-tls",
        "The upstream does not speak TLS on this port.",
        "Use the broker's TLS port (8883 is usual), not its plaintext port (1883).",
    )
    TLS_TIMEOUT = (
        "tls-timeout",
        "The TLS handshake did not finish in time.",
        "Check that the port speaks TLS and that nothing between here and the broker holds it up.",
    )
    TLS_CLOSED = (
        "tls-closed",
        "The upstream closed the connection during the TLS handshake.",
        "Check that this is the broker's TLS port (8883 is usual, 1883 is plaintext); if so, look at its log for why.",
    )
    TLS_HANDSHAKE_FAILED = (
        "tls-handshake-failed",
        "The TLS handshake failed.",
        "The detail names OpenSSL's reason; `mqtts-gateway check` shows the step.",
    )
    TLS_VERSION = (
        "tls-version",
        "The broker offers no TLS version that the gateway accepts.",
        "Enable TLS 1.2 or 1.3 on the broker.",
    )
    TLS_CLIENT_CERTIFICATE_REFUSED = (
        "tls-client-certificate-refused",
        "The broker demands a client certificate, or refused the one it was shown.",
        "Set tls.client_cert and its key, or those of the device's rule, as the broker expects; check its dates.",
    )
    TLS_ALPN_MISMATCH = (
        "tls-alpn-mismatch",
        "The broker agreed to none of the configured application protocols.",
        "Set tls.alpn to what the broker expects on this port, or leave it out.",
    )

    # Why there is no upstream: verification.
    TLS_UNTRUSTED_CHAIN = (
        "tls-untrusted-chain",
        "The broker's certificate does not lead to a trusted root.",
        "Set tls.ca_file to the CA that issued it; let the broker send its intermediate certificates.",
    )
    TLS_NAME_MISMATCH = (
        "tls-name-mismatch",
        "The broker's certificate is not for the name that was asked for.",
        "Use the name in its subjectAltName as the upstream host or as server_name, or have it issued anew.",
    )
    TLS_EXPIRED = (
        "tls-expired",
        "A certificate of the broker has expired.",
        "Renew the broker's certificate; check this machine's clock.",
    )
    TLS_NOT_YET_VALID = (
        "tls-not-yet-valid",
        "A certificate of the broker is not yet valid.",
        "Check this machine's clock first (the detail shows it); then the certificate's dates.",
    )
    CLOCK_IMPLAUSIBLE = (
        "clock-implausible",
        "To this machine's clock something is not yet valid, and the clock is before the day this version was made.",
        "Set this machine's clock (NTP, or a battery for it); the gateway tries again until it is right.",
    )
    TLS_REVOKED = (
        "tls-revoked",
        "A certificate of the broker is on the revocation list.",
        "Have the broker's certificate issued anew, and find out why it was revoked.",
    )
    TLS_CRL_UNUSABLE = (
        "tls-crl-unusable",
        "Revocation could not be checked: a CRL is missing, expired or not signed by the issuer.",
        "Fetch the current CRL of every CA in the chain into tls.crl_file.",
    )
    TLS_WRONG_PURPOSE = (
        "tls-wrong-purpose",
        "The broker's certificate is not meant for a TLS server.",
        "Issue it with the extended key usage serverAuth.",
    )
    TLS_WEAK_CERTIFICATE = (
        "tls-weak-certificate",
        "A certificate of the broker has a key or a signature too weak to trust.",
        "Issue it anew with at least RSA 2048 or P-256, signed with SHA-256.",
    )
    TLS_PIN_MISMATCH = (
        "tls-pin-mismatch",
        "No public key in the broker's chain is one of the configured pins.",
        "If the broker's key was changed on purpose, change tls.pin; otherwise find out who answers.",
    )
    TLS_STRICT_REFUSED = (
        "tls-strict-refused",
        "The second, stricter verification refused the chain.",
        'The detail names the rule; use verification = "standard" if the CA cannot be changed.',
    )
    TLS_VERIFICATION_ERROR = (
        "tls-verification-error",
        "The verification itself met something unexpected, so the broker was refused.",
        "Report the detail as a fault of the gateway.",
    )

    # Why there is no upstream: MQTT.
    UPSTREAM_SILENT = (
        "upstream-silent",
        "The broker did not answer CONNECT in time.",
        "Look at the broker's log and load; check that the port speaks MQTT.",
    )
    UPSTREAM_REFUSED = (
        "upstream-refused",
        "The broker refused CONNECT; the device was given the broker's own answer.",
        "Look up the code in the record: wrong credentials, a forbidden Client Identifier, a policy.",
    )
    UPSTREAM_CLOSED = (
        "upstream-closed",
        "The broker closed the connection without answering CONNECT.",
        "Look at the broker's log: policies on Client Identifier or certificate often end so.",
    )
    UPSTREAM_PROTOCOL_ERROR = (
        "upstream-protocol-error",
        "The broker sent bytes that MQTT does not allow.",
        "Check that the port speaks MQTT, not WebSocket or HTTP; report the detail to the broker's maker.",
    )

    INTERNAL_ERROR = (
        "internal-error",
        "The gateway made a mistake; only this session was ended.",
        "Report the traceback in the log.",
    )


class GatewayError(Exception):
    """What every exception of this package is."""


class ConfigError(GatewayError):
    """The configuration cannot be used.

    `problems` holds a line for each thing that is wrong, each naming its dotted key; `str()` gives them all.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class SessionEnd(GatewayError):
    """A session cannot go on: the fixed word, and the particulars for the record.

    `detail` is for operators, so it never holds a secret; text from a device in it is escaped by whoever shows it.
    """

    def __init__(self, reason: EndReason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


class Refusal(SessionEnd):
    """The gateway itself does not let a device in whose CONNECT it has read.

    `code_3` is what its CONNACK says before 5.0, `code_5` the reason code of 5.0 (MQTT 3.1.1 §3.2.2.3, MQTT 5.0
    §3.2.2.2).
    """

    def __init__(self, reason: EndReason, detail: str, code_3: int, code_5: int) -> None:
        super().__init__(reason, detail)
        self.code_3 = code_3
        self.code_5 = code_5


class PacketError(SessionEnd):
    """A peer broke MQTT's rules.

    `reason_code` is the MQTT 5.0 reason code that names the fault (MQTT 5.0 §2.4): 0x81 Malformed Packet,
    0x82 Protocol Error, 0x95 Packet too large, 0x84 Unsupported Protocol Version.
    """

    def __init__(self, reason: EndReason, reason_code: int, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason_code = reason_code


class UpstreamFailure(SessionEnd):
    """There is no verified channel to the broker."""
