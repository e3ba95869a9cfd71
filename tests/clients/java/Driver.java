// Drives clients of Spring's WebSocketStompClient; conftest.py describes the orders and what is told.

import com.fasterxml.jackson.core.type.TypeReference;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.lang.reflect.Type;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.ConcurrentHashMap;
import java.util.logging.Level;
import java.util.logging.Logger;
import org.springframework.messaging.simp.stomp.StompFrameHandler;
import org.springframework.messaging.simp.stomp.StompHeaders;
import org.springframework.messaging.simp.stomp.StompSession;
import org.springframework.messaging.simp.stomp.StompSessionHandlerAdapter;
import org.springframework.scheduling.concurrent.ThreadPoolTaskScheduler;
import org.springframework.web.socket.WebSocketHttpHeaders;
import org.springframework.web.socket.client.standard.StandardWebSocketClient;
import org.springframework.web.socket.messaging.WebSocketStompClient;

public class Driver {
    static final String QUEUE = "/user/queue/online-status";
    static final ObjectMapper JSON = new ObjectMapper();
    static final Map<String, StompSession> SESSIONS = new ConcurrentHashMap<>();
    static final Map<String, List<String>> WATCHED = new ConcurrentHashMap<>();

    record Order(String client, String doing, String url, String token, List<String> users) {
        static Order of(Map<String, Object> order) {
            return new Order((String) order.get("client"), (String) order.get("do"), (String) order.get("url"),
                    (String) order.get("token"), JSON.convertValue(order.get("users"), new TypeReference<>() {}));
        }
    }

    public static void main(String[] arguments) throws Exception {
        Logger.getLogger("").setLevel(Level.OFF);
        ThreadPoolTaskScheduler scheduler = new ThreadPoolTaskScheduler();
        scheduler.initialize();
        WebSocketStompClient client = new WebSocketStompClient(new StandardWebSocketClient());
        client.setTaskScheduler(scheduler); // else it has no heart-beats
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line; (line = lines.readLine()) != null; ) {
            Order order = Order.of(JSON.readValue(line, new TypeReference<>() {}));
            switch (order.doing) {
                case "connect" -> {
                    StompHeaders headers = new StompHeaders();
                    headers.set("Authorization", "Bearer " + order.token);
                    client.connectAsync(order.url, new WebSocketHttpHeaders(), headers, new Teller(order.client));
                }
                case "watch" -> watch(order.client, order.users);
                case "beat" -> SESSIONS.get(order.client).send("/app/heartbeat", new byte[0]);
                case "leave" -> {
                    SESSIONS.get(order.client).disconnect();
                    tell(order.client, "left", Map.of());
                }
                default -> throw new IllegalArgumentException(order.doing);
            }
        }
        System.exit(0);
    }

    static void watch(String name, List<String> users) throws Exception {
        WATCHED.put(name, users);
        SESSIONS.get(name).send("/app/presence.subscribe", JSON.writeValueAsBytes(Map.of("userIds", users)));
    }

    static synchronized void tell(String name, String saw, Map<String, Object> more) {
        try {
            Map<String, Object> sight = new TreeMap<>(more);
            sight.put("client", name);
            sight.put("saw", saw);
            System.out.println(JSON.writeValueAsString(sight));
        } catch (Exception impossible) {
            throw new IllegalStateException(impossible);
        }
    }

    static class Teller extends StompSessionHandlerAdapter {
        final String name;

        Teller(String name) {
            this.name = name;
        }

        @Override
        public void afterConnected(StompSession session, StompHeaders headers) {
            SESSIONS.put(name, session);
            session.subscribe(QUEUE, new StompFrameHandler() {
                @Override
                public Type getPayloadType(StompHeaders headers) {
                    return byte[].class;
                }

                @Override
                public void handleFrame(StompHeaders headers, Object payload) {
                    try {
                        tell(name, "message", JSON.readValue((byte[]) payload, new TypeReference<>() {}));
                    } catch (Exception error) {
                        throw new IllegalStateException(error);
                    }
                }
            });
            try {
                if (WATCHED.containsKey(name)) watch(name, WATCHED.get(name));
            } catch (Exception error) {
                throw new IllegalStateException(error);
            }
            tell(name, "connected", Map.of());
        }

        @Override
        public Type getPayloadType(StompHeaders headers) {
            return byte[].class;
        }

        @Override
        public void handleFrame(StompHeaders headers, Object payload) { // ERROR
            tell(name, "refused", Map.of("text", String.valueOf(headers.getFirst("message"))));
        }

        @Override
        public void handleTransportError(StompSession session, Throwable error) {
            tell(name, "closed", Map.of());
        }
    }
}
