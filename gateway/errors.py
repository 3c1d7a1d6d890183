"""Why sessions end, in fixed words, and the exceptions that carry those words.

In: nothing.  Out: `EndReason`, the words that logs, metrics and documents share, and the exceptions of all packages.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class EndReason(StrEnum):
    """Why a session ended: a fixed word, what it means, and what to do about it.

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
        "No action: this is the normal end of a session.",
    )
    DEVICE_LOST = (
        "device-lost",
        "The device closed or reset its connection without DISCONNECT; the broker publishes its Will, if it has one.",
        "Check the device's power and network. If it sent no CONNECT, it may be a port scan or a TCP health check.",
    )
    KEEPALIVE_TIMEOUT = (
        "keepalive-timeout",
        "The device sent nothing for one and a half times its Keep Alive.",
        "Check the device's power and network; on a bad link, use a longer Keep Alive.",
    )
    UPSTREAM_DISCONNECT = (
        "upstream-disconnect",
        "The broker ended the session with DISCONNECT.",
        "See the reason code in the detail; often another client took over the Client Identifier.",
    )
    UPSTREAM_LOST = (
        "upstream-lost",
        "The connection to the broker was lost during the session.",
        "Check the broker's log at this time: a restart, a takeover of the Client Identifier, or the network.",
    )
    STORE_UNAVAILABLE = (
        "store-unavailable",
        "No broker was available, and the store could not take the device's messages.",
        "See `mqtts-gateway status` for the cause; free space on the disk, raise store.max_size, or repair the disk.",
    )
    STORED_SESSION_DIFFERS = (
        "stored-session-differs",
        "What the gateway told the device during an outage does not match the broker's state or the current rules.",
        "No action if rare: the device reconnects and gets the current state.",
    )
    GATEWAY_STOPPING = ("gateway-stopping", "The gateway is stopping.", "No action: the device reconnects.")

    CONFIGURATION_CHANGED = (
        "configuration-changed",
        "A reload took effect before the broker had accepted the session.",
        "No action: the device reconnects, under the new configuration.",
    )

    # What the device did wrong.
    CONNECT_TIMEOUT = (
        "connect-timeout",
        "The device did not send a complete CONNECT in time.",
        "Find out what connects to this port: an MQTT client sends CONNECT at once, a port scanner does not.",
    )
    NOT_MQTT = (
        "not-mqtt",
        "The first bytes were not an MQTT CONNECT.",
        "Use plain MQTT on this port, not TLS, HTTP or WebSocket; a PROXY header requires listen.proxies.",
    )
    MALFORMED_PACKET = (
        "malformed-packet",
        "The device sent a packet that its MQTT version does not allow.",
        'Correct the settings or firmware of the device; after CONNECT, conformance = "lenient" in its rule may help.',
    )
    PROTOCOL_ERROR = (
        "protocol-error",
        "The device sent a packet that is not allowed at this point.",
        "Update the device's firmware, or report the detail to its vendor.",
    )
    PACKET_TOO_LARGE = (
        "packet-too-large",
        "A packet exceeded the maximum size or number of elements.",
        "Raise max_packet_size in [limits] or in the rule (CONNECT: limits.max_connect_size), or send smaller packets.",
    )
    UNSUPPORTED_PROTOCOL_VERSION = (
        "unsupported-protocol-version",
        "The device requested a protocol level other than 3 (MQTT 3.1), 4 (3.1.1) or 5 (5.0).",
        "Set the device to MQTT 3.1.1.",
    )

    # Connections that the gateway refuses.
    NETWORK_NOT_ALLOWED = (
        "network-not-allowed",
        "The device's address is not in an allowed network.",
        "If the device is yours, add its network to admission.allow.",
    )
    TOO_MANY_SESSIONS = (
        "too-many-sessions",
        "The gateway has reached its limit of sessions.",
        "Raise admission.max_sessions and the unit's LimitNOFILE, or set admission.max_sessions_per_address.",
    )
    TOO_MANY_FROM_ADDRESS = (
        "too-many-from-address",
        "This address has reached its limit of sessions.",
        "Raise admission.max_sessions_per_address, or find out why it opens so many sessions.",
    )
    RATE_LIMITED = (
        "rate-limited",
        "This address opens new sessions faster than the configured rate.",
        "Raise admission.new_sessions_per_second, or find out why the device reconnects so often.",
    )
    TOO_MANY_NEW_SESSIONS = (
        "too-many-new-sessions",
        "Too many devices connected at once, and this one waited too long for its turn.",
        "Usually no action: devices reconnect. If it persists, raise pacing.new_sessions_per_second.",
    )
    PROXY_NOT_TRUSTED = (
        "proxy-not-trusted",
        "A connection to a load-balancer listener came from an address that is not in listen.proxies.",
        "Add your load balancer's address to listen.proxies; devices must connect through a load balancer.",
    )
    NO_PROXY_HEADER = (
        "no-proxy-header",
        "A load balancer's connection did not begin with a valid PROXY protocol header.",
        "Make the load balancer send it (HAProxy: send-proxy-v2, nginx: proxy_protocol on), or remove listen.proxies.",
    )

    # What the device rules do not permit.
    DEVICE_UNKNOWN = (
        "device-unknown",
        "No rule matches this device, and unknown devices are refused.",
        "If it is yours, run `mqtts-gateway device add ID` (with `--ca-cert` if it needs a certificate), then reload.",
    )
    DEVICE_RULE_BROKEN = (
        "device-rule-broken",
        "The device's rule, or a key or certificate that it names, cannot be used.",
        "Correct what the detail names. If you change the rule itself, reload the gateway.",
    )
    DEVICE_DISABLED = (
        "device-disabled",
        "The device's rule says enabled = false.",
        "To let the device connect again, run `mqtts-gateway device enable ID` or set enabled in its rule, and reload.",
    )
    DEVICE_PASSWORD_WRONG = (
        "device-password-wrong",
        "The user name or password in CONNECT does not match the device's rule.",
        "Correct the device's password, or create a new lan_password hash for its rule.",
    )
    DEVICE_NAME_UNUSABLE = (
        "device-name-unusable",
        "A name that the device's rule uses is missing, too long, or has characters that templates do not allow.",
        "Use only letters, digits and . _ : @ - in the device's name, or remove the placeholder from its rule.",
    )
    SPOOFED = (
        "spoofed",
        "The device's rule does not allow this Client Identifier from this address.",
        "Find out what uses this address; if the device has moved, change bound_to in its rule.",
    )
    CLIENT_ID_IN_USE = (
        "client-id-in-use",
        "This Client Identifier already has a session from another address.",
        'Give each device its own Client Identifier, or set devices.same_client_id = "take-over".',
    )
    CLIENT_ID_RESERVED = (
        "client-id-reserved",
        "The Client Identifier that this device would have at the broker belongs to another rule.",
        "If this device is one of yours, give it another Client Identifier, or add or correct its rule.",
    )
    CLIENT_ID_PACED = (
        "client-id-paced",
        "This Client Identifier connects more often than the configured rate.",
        "Look for two devices with the same Client Identifier, or find out why the device reconnects so often.",
    )
    TAKEN_OVER = (
        "taken-over",
        "A new session with the same Client Identifier replaced this one.",
        "No action if the device reconnected; otherwise look for two devices with the same Client Identifier.",
    )
    RULE_REFUSED = (
        "rule-refused",
        "The device did something that its rule does not permit.",
        "Correct the device, or the key of its rule that the detail names.",
    )
    CREDENTIALS_UNAVAILABLE = (
        "credentials-unavailable",
        "The password or token for the broker could not be obtained.",
        "Check the source that the detail names: a file, a credential, a command or a key of the device's rule.",
    )
    CONNECT_NOT_REWRITABLE = (
        "connect-not-rewritable",
        "The changes that the device's rule makes would give an invalid CONNECT.",
        "Correct what the detail names: a field that is too long, or a password without a user name.",
    )
    TOKEN_EXPIRING = (
        "token-expiring",
        "The token that this session was opened with is about to expire.",
        "No action: the device reconnects and gets a new token.",
    )

    # Why there is no upstream: this machine, DNS and TCP.
    OUT_OF_RESOURCES = (
        "out-of-resources",
        "This machine had no free descriptor, thread, memory or local port for a connection to the broker.",
        "See the detail. Raise the unit's LimitNOFILE or TasksMax, or find what uses up what is missing.",
    )
    DNS_FAILED = (
        "dns-failed",
        "The broker's name could not be resolved.",
        "Check the spelling of the upstream host and this machine's name servers.",
    )
    TCP_REFUSED = (
        "tcp-refused",
        "The broker's host refused the connection.",
        "Check the port (usually 8883 for MQTT over TLS) and that the broker is running.",
    )
    TCP_TIMEOUT = (
        "tcp-timeout",
        "The broker's host did not answer in time.",
        "Check the firewall between here and the broker, and the port.",
    )
    TCP_UNREACHABLE = (
        "tcp-unreachable",
        "There is no route to the broker, or the proxy could not reach it.",
        "Check the broker's address, and the network and default route of this machine, or of the proxy.",
    )

    # Why there is no upstream: the proxy on the way to it.
    PROXY_UNREACHABLE = (
        "proxy-unreachable",
        "The proxy could not be reached, or did not answer as a proxy.",
        "Check the address, port and scheme of the upstream's `proxy`, and that the proxy is running.",
    )
    PROXY_REFUSED = (
        "proxy-refused",
        "The proxy does not allow a connection to the broker.",
        "Ask the proxy's administrator to allow the broker's host and port; many proxies allow only port 443.",
    )
    PROXY_AUTHENTICATION = (
        "proxy-authentication",
        "The proxy requires credentials, or rejected those it got.",
        "Check proxy_username and proxy_password_file. For NTLM or Kerberos, run a local helper: cntlm or alpaca.",
    )
    PROXY_INTERCEPTS_TLS = (
        "proxy-intercepts-tls",
        "No trusted CA issued the certificate that came through the proxy: the proxy may be intercepting TLS.",
        "Have the proxy exempt the broker from inspection; if the broker has a private CA, set tls.ca_file.",
    )

    # Why there is no upstream: the TLS handshake.
    TLS_NOT_TLS = (
        "tls-not-tls",
        "The broker does not speak TLS on this port.",
        "Use the broker's TLS port (usually 8883), not its plaintext port (usually 1883).",
    )
    TLS_TIMEOUT = (
        "tls-timeout",
        "The TLS handshake did not finish in time.",
        "Check that the port speaks TLS, and look for a firewall or proxy that delays the handshake.",
    )
    TLS_CLOSED = (
        "tls-closed",
        "The broker closed the connection during the TLS handshake.",
        "Check that this is the broker's TLS port (usually 8883; 1883 is plaintext); if it is, check the broker's log.",
    )
    TLS_HANDSHAKE_FAILED = (
        "tls-handshake-failed",
        "The TLS handshake failed.",
        "Enable on the broker what the detail lists, or set tls.ciphers to what `mqtts-gateway check` finds there.",
    )
    TLS_VERSION = (
        "tls-version",
        "The broker offers no TLS version that the gateway accepts.",
        "Enable TLS 1.2 or 1.3 on the broker.",
    )
    TLS_CLIENT_CERTIFICATE_REFUSED = (
        "tls-client-certificate-refused",
        "The broker requires a client certificate, or rejected the one it got.",
        "Set tls.client_cert and tls.client_key, or those of the rule, to a certificate that the broker accepts.",
    )
    TLS_ALPN_MISMATCH = (
        "tls-alpn-mismatch",
        "The broker accepted none of the configured application protocols (ALPN).",
        "Set tls.alpn to what the broker expects on this port, or remove it.",
    )

    # Why there is no upstream: verification.
    TLS_UNTRUSTED_CHAIN = (
        "tls-untrusted-chain",
        "The broker's certificate chain does not end at a trusted root.",
        "Set tls.ca_file to the CA that issued it; configure the broker to send its intermediate certificates.",
    )
    TLS_NAME_MISMATCH = (
        "tls-name-mismatch",
        "The broker's certificate is not valid for the expected name.",
        "Set the upstream host or server_name to a name in its subjectAltName, or have the certificate reissued.",
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
        "This machine's clock is wrong: it is earlier than this version's release, and a certificate is not yet valid.",
        "Set this machine's clock (NTP or a real-time clock); the gateway retries until it is correct.",
    )
    TLS_REVOKED = (
        "tls-revoked",
        "A certificate of the broker has been revoked.",
        "Have the broker's certificate reissued, and find out why it was revoked.",
    )
    TLS_CRL_UNUSABLE = (
        "tls-crl-unusable",
        "Revocation could not be checked: a CRL is missing, expired or not signed by the issuer.",
        "Put the current CRL of every CA in the chain into tls.crl_file.",
    )
    TLS_WRONG_PURPOSE = (
        "tls-wrong-purpose",
        "The broker's certificate is not issued for TLS servers.",
        "Reissue it with the extended key usage serverAuth.",
    )
    TLS_WEAK_CERTIFICATE = (
        "tls-weak-certificate",
        "A certificate of the broker has a key or signature that is too weak.",
        "Reissue it with at least RSA 2048 or P-256, signed with SHA-256.",
    )
    TLS_OCSP_UNUSABLE = (
        "tls-ocsp-unusable",
        "The broker's OCSP response is missing, out of date or not valid.",
        "Enable OCSP stapling on the broker, or set tls.ocsp to off; check this machine's clock.",
    )
    TLS_PIN_MISMATCH = (
        "tls-pin-mismatch",
        "No public key in the broker's chain matches a configured pin.",
        "If the broker's key was changed on purpose, update tls.pin; otherwise find out which server answers.",
    )
    TLS_STRICT_REFUSED = (
        "tls-strict-refused",
        "The additional checks of strict verification rejected the chain.",
        'The detail names the rule; use verification = "standard" if the CA cannot be changed.',
    )
    TLS_VERIFICATION_ERROR = (
        "tls-verification-error",
        "Verification hit an unexpected error, so the broker was rejected.",
        "Report the detail as a bug in the gateway.",
    )

    # Why there is no upstream: WebSocket.
    WEBSOCKET_REFUSED = (
        "websocket-refused",
        "The broker did not open a WebSocket on this port.",
        "Check the upstream's `path` and port, and what request_file or request_command adds to the request.",
    )

    # Why there is no upstream: MQTT.
    UPSTREAM_SILENT = (
        "upstream-silent",
        "The broker did not answer CONNECT in time.",
        "Check the broker's log and load, and that the port speaks MQTT.",
    )
    UPSTREAM_REFUSED = (
        "upstream-refused",
        "The broker refused CONNECT; the device got the broker's answer.",
        "See the code in the detail: wrong credentials, a rejected Client Identifier, or a policy.",
    )
    UPSTREAM_CLOSED = (
        "upstream-closed",
        "The broker closed the connection without answering CONNECT.",
        "Check the broker's log: a policy on the Client Identifier or certificate is a common cause.",
    )
    UPSTREAM_PROTOCOL_ERROR = (
        "upstream-protocol-error",
        "The broker sent bytes that MQTT does not allow.",
        'If it happened before CONNACK, check that `transport` fits the port; if after, try conformance = "lenient".',
    )

    INTERNAL_ERROR = (
        "internal-error",
        "An internal error of the gateway ended this session, and no other.",
        "Report the traceback in the log.",
    )


class GatewayError(Exception):
    """Base class of all exceptions in this package."""


class ConfigError(GatewayError):
    """The configuration cannot be used.

    `problems` has one line for each problem, which names its dotted key; `str()` gives them all.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class NotNow(ConfigError):
    """The configuration could not be read for want of descriptors or memory; later it may be."""


def let_frames_go(error: BaseException | None) -> None:
    """Remove the tracebacks of an exception that a coroutine has dealt with, and of those it was raised after.

    Since Python 3.12, a traceback keeps the frames that called the coroutine: those of Twisted, and those that failed
    the Deferred it waited for.  They reference the exception, so only the garbage collector could free it, and with it
    all that the frames reference: the session, its connections and its configuration.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


class SessionEnd(GatewayError):
    """A session cannot continue: the fixed word, and details for the record.

    `detail` is for operators.  It never contains a secret.  Text of a peer in it is `printable`: show it with
    `unprintable_escaped`.
    """

    def __init__(self, reason: EndReason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


class Refusal(SessionEnd):
    """The gateway refuses a device after reading its CONNECT.

    `code_3` is the CONNACK return code before 5.0, `code_5` the reason code of 5.0 (MQTT 3.1.1 §3.2.2.3, MQTT 5.0
    §3.2.2.2).
    """

    def __init__(self, reason: EndReason, detail: str, code_3: int, code_5: int) -> None:
        super().__init__(reason, detail)
        self.code_3 = code_3
        self.code_5 = code_5


class PacketError(SessionEnd):
    """A peer violated the MQTT protocol.

    `reason_code` is the MQTT 5.0 reason code that names the fault (MQTT 5.0 §2.4): 0x81 Malformed Packet,
    0x82 Protocol Error, 0x95 Packet too large, 0x84 Unsupported Protocol Version.
    """

    def __init__(self, reason: EndReason, reason_code: int, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason_code = reason_code


class UpstreamFailure(SessionEnd):
    """There is no verified channel to the broker.

    `is_orderly` tells that the broker has closed the connection, which neither broke nor was reset.
    """

    def __init__(self, reason: EndReason, detail: str = "", *, is_orderly: bool = False) -> None:
        super().__init__(reason, detail)
        self.is_orderly = is_orderly


class UnknownIssuer(UpstreamFailure):
    """Nobody that is trusted issued the broker's certificate."""
