// The certified `oidc-provider` behind the contract of ../README.md.

import http from 'node:http';
import https from 'node:https';

import { Provider, errors } from 'oidc-provider';

const config = {
  clients: [], scopes: [], resources: {}, lifetime: 300, ...JSON.parse(process.argv[2] ?? '{}'),
};
const state = { lifetime: config.lifetime, fail: null, delay: 0 };
const counts = { token_requests: 0, granted: 0, api_requests: 0, api_refused: 0 };

// What the provider stores, by model and id. Its own adapter forgets after a thousand entries.
const stored = new Map();

const modelOf = (model) => {
  if (!stored.has(model)) stored.set(model, new Map());
  return stored.get(model);
};

// Clients are found here, and not in the provider's settings, so that a secret can change.
for (const client of config.clients) {
  modelOf('Client').set(client.client_id, {
    grant_types: ['client_credentials'], redirect_uris: [], response_types: [], ...client,
  });
}

class Adapter {
  constructor(model) {
    this.entries = modelOf(model);
  }

  async upsert(id, payload) {
    this.entries.set(id, payload);
  }

  async find(id) {
    return this.entries.get(id);
  }

  async destroy(id) {
    this.entries.delete(id);
  }

  async consume(id) {
    this.entries.get(id).consumed = Math.floor(Date.now() / 1000);
  }

  async findByUid() {}

  async findByUserCode() {}

  async revokeByGrantId() {}
}

const listen = (server) => new Promise((resolve) => {
  server.listen(0, '127.0.0.1', () => resolve(server.address().port));
});

const main = config.tls
  ? https.createServer({ key: config.tls.key, cert: config.tls.cert })
  : http.createServer();
const origin = config.tls
  ? `https://localhost:${await listen(main)}`
  : `http://127.0.0.1:${await listen(main)}`;

// A client without a certificate has to get through the handshake and be refused by the provider.
const mutual = config.tls && https.createServer({
  ...config.tls, requestCert: true, rejectUnauthorized: false,
});
const mutualOrigin = mutual && `https://localhost:${await listen(mutual)}`;

const peer = (ctx) => ctx.socket.getPeerX509Certificate?.();

const subjectMatches = (ctx, property, expected) => {
  const certificate = peer(ctx);
  switch (property) {
    case 'tls_client_auth_san_dns':
      return (certificate.subjectAltName ?? '').split(', ').includes(`DNS:${expected}`);
    case 'tls_client_auth_subject_dn':
      // Node writes one attribute a line, where RFC 4514 has commas.
      return certificate.subject.split('\n').reverse().join(',') === expected;
    default:
      return false;
  }
};

const audience = { issuer: origin, token_endpoint: `${origin}/token` }[config.assertions];

// The provider itself takes either audience, and any type.
const judgeAssertion = (ctx, claims, { typ }) => {
  const good = claims.aud === audience
    && (config.assertions !== 'issuer' || typ === 'client-authentication+jwt');
  if (audience && !good) throw new errors.InvalidClientAuth('not addressed to this server');
};

const provider = new Provider(origin, {
  adapter: Adapter,
  assertJwtClientAuthClaimsAndHeader: judgeAssertion,
  clientAuthMethods: [
    'none', 'client_secret_basic', 'client_secret_post', 'client_secret_jwt', 'private_key_jwt',
    'tls_client_auth', 'self_signed_tls_client_auth',
  ],
  discovery: mutual
    ? { mtls_endpoint_aliases: { token_endpoint: `${mutualOrigin}/token` } }
    : {},
  enabledJWA: {
    clientAuthSigningAlgValues: ['HS256', 'RS256', 'PS256', 'ES256', 'EdDSA'],
  },
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    introspection: { enabled: true },
    mTLS: {
      enabled: true,
      tlsClientAuth: true,
      selfSignedTlsClientAuth: true,
      getCertificate: peer,
      certificateAuthorized: (ctx) => ctx.socket.authorized === true,
      certificateSubjectMatches: subjectMatches,
    },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (ctx, resource) => {
        const scope = config.resources[resource];
        if (scope === undefined) throw new errors.InvalidTarget();
        return { scope, accessTokenFormat: 'opaque', accessTokenTTL: state.lifetime };
      },
    },
    revocation: { enabled: true },
  },
  scopes: config.scopes,
  ttl: { ClientCredentials: () => state.lifetime },
});
provider.on('client_credentials.saved', () => { counts.granted += 1; });

const send = (response, status, headers, body) => {
  response.writeHead(status, { 'content-type': 'application/json', ...headers });
  response.end(JSON.stringify(body));
};

const read = async (request) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  return Buffer.concat(chunks).toString();
};

const pause = (time) => new Promise((resolve) => { setTimeout(resolve, time); });

const admin = async (request, response) => {
  const orders = request.method === 'POST' ? JSON.parse(await read(request)) : {};
  for (const [order, value] of Object.entries(orders)) {
    switch (order) {
      case 'revoke_all':
        modelOf('ClientCredentials').clear();
        break;
      case 'secret': {
        const clients = modelOf('Client');
        const { client_secret } = value;
        clients.set(value.client_id, { ...clients.get(value.client_id), client_secret });
        break;
      }
      case 'lifetime':
      case 'fail':
      case 'delay':
        state[order] = value;
        break;
      default:
        return send(response, 400, {}, { error: `no such order: ${order}` });
    }
  }
  return send(response, 200, {}, counts);
};

const api = async (request, response) => {
  counts.api_requests += 1;
  const [, text] = /^Bearer (.+)$/.exec(request.headers.authorization ?? '') ?? [];
  const token = text && await provider.ClientCredentials.find(text);
  request.resume();
  if (token?.isValid) {
    return send(response, 200, {}, { client_id: token.clientId, token: text });
  }
  counts.api_refused += 1;
  const challenge = text ? 'Bearer error="invalid_token"' : 'Bearer';
  return send(response, 401, { 'www-authenticate': challenge }, {});
};

const callback = provider.callback();
const handle = async (request, response) => {
  switch (new URL(request.url, origin).pathname) {
    case '/admin':
      return admin(request, response);
    case '/api':
      return api(request, response);
    case '/token':
      counts.token_requests += 1;
      await pause(state.delay);
      if (state.fail) {
        request.resume();
        const { status, headers, body } = state.fail;
        return send(response, status, headers, body ?? {});
      }
      return callback(request, response);
    default:
      return callback(request, response);
  }
};
main.on('request', handle);
mutual?.on('request', handle);

console.log(JSON.stringify({
  issuer: origin,
  token_endpoint: `${origin}/token`,
  introspection_endpoint: `${origin}/token/introspection`,
  revocation_endpoint: `${origin}/token/revocation`,
  api: `${origin}/api`,
  admin: `${origin}/admin`,
  ...(mutual && { mtls_token_endpoint: `${mutualOrigin}/token` }),
}));
process.stdin.resume().on('end', () => process.exit(0));
